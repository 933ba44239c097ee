"""What a user switches on kernels: whether they run at all, and how the GPU's ones rotate.

    MEGATRON_LOWBIT_KERNELS=0               plain torch everywhere
    MEGATRON_LOWBIT_ROTATION=tensor-cores   the Triton kernels rotate by matrix products

Stands below all kernels, so that each of them can ask.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_lowbit.errors import LowbitError

SWITCH = "MEGATRON_LOWBIT_KERNELS"
ROTATION_SWITCH = "MEGATRON_LOWBIT_ROTATION"
ROTATIONS = BUTTERFLIES, TENSOR_CORES = "butterflies", "tensor-cores"

_off = False
_rotation: str | None = None  # as the environment has it, once that was read


def switched_off() -> str:
    """Why no kernel at all shall run: empty if they may."""
    return "disabled" if _off else switched_off_by_user()


def switched_off_by_user() -> str:
    """The same, of the environment alone."""
    return f"switched off by {SWITCH}=0" if os.environ.get(SWITCH) == "0" else ""


@contextmanager
def disabled() -> Iterator[None]:
    """Run the plain-torch codecs inside, in all threads of this process."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def is_disabled() -> bool:
    """Whether this runs inside `disabled()`."""
    return _off


def rotation() -> str:
    """How the GPU kernels rotate: ``butterflies``, or ``tensor-cores`` where the user says so.

    The environment is read once.

    Raises:
        LowbitError: It names another way.
    """
    global _rotation
    if _rotation is None:
        asked = os.environ.get(ROTATION_SWITCH) or BUTTERFLIES
        if asked not in ROTATIONS:
            raise LowbitError(f"{ROTATION_SWITCH}={asked}: choose {' or '.join(ROTATIONS)}")
        _rotation = asked
    return _rotation


@contextmanager
def rotating_by(way: str | None) -> Iterator[None]:
    """Have the GPU kernels rotate by one of `ROTATIONS` inside, in all threads of this process.

    None: by what the environment says, read anew.
    """
    global _rotation
    before, _rotation = _rotation, way
    try:
        yield
    finally:
        _rotation = before
