"""Which kernels serve which tensors: C on CPUs, Triton on GPUs, or none.

The only place that knows. A family of kernels serves one codec or several; its modules for CPUs and
GPUs have the same functions. Triton is imported when the first GPU tensor comes, and tried out on
that device: what is missing or broken is said once, and plain torch does the work, with the same
bits.

Error feedback (`codecs.carry`) is known to the rotated family alone: its modules have
`encode_with_carry` and, on GPUs, `reduce_encode_with_carry`. Elsewhere a kernel encodes, a kernel
reads back, and plain torch does what is between: static and scaled bodies are not in the order of
features in which a row's squares are summed, and the peers' formats are for comparison.

The trial waits for the device, so make one call before a CUDA graph captures others, as
kernels that are compiled at first use need anyway.
"""

import importlib
import threading
import warnings
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels.cpu import build, rotated
from megatron_lowbit.kernels.switches import (
    BUTTERFLIES,
    SWITCH,
    TENSOR_CORES,
    rotation,
    switched_off,
)

ROTATED, STATIC, SCALED, GROUPED, NORM = "rotated", "static", "scaled", "grouped", "norm"
_TRITON = {
    ROTATED: "megatron_lowbit.kernels.triton.rotated",
    STATIC: "megatron_lowbit.kernels.triton.static",
    SCALED: "megatron_lowbit.kernels.triton.scaled",
    GROUPED: "megatron_lowbit.kernels.triton.grouped",
    NORM: "megatron_lowbit.kernels.triton.norm",
}
# 3.2 has no tl.gather and 3.3 does not compile the peers' formats. Before 3.5 an atomic on a tensor
# may give its result to some of a program's threads only (triton-lang/triton, issue 7402): over
# symmetric memory the others would wait for ever.
FIRST_TRITON = (3, 5)
_lock = threading.Lock()
_tried: list[str] = []  # what the trial said, once there was one


def kernels_for(family: str, *tensors: Tensor) -> ModuleType | None:
    """The module of kernels for these tensors, or None where plain torch must do.

    Args:
        family: `ROTATED`, `STATIC`, `SCALED`, `GROUPED` or `NORM`.
        tensors: All on one device, else there is none.
    """
    kind = _kind(*tensors)
    if kind == "cuda":
        return None if switched_off() or _trouble() else _module(family)
    has_c = kind == "cpu" and family == ROTATED and build.library() is not None
    return rotated if has_c else None


def symmetric() -> ModuleType:
    """The kernels that all-reduce in memory that GPUs share; `comm.symmetric_memory` asks for them.

    No switch leaves them out here: one rank alone must not go another way than its peers.
    """
    return importlib.import_module("megatron_lowbit.kernels.triton.symmetric")


def describe(kind: str = "cpu") -> str:
    """What the codecs run on CPUs (``C (gcc 12.2.0)``) or, asked for ``cuda``, on GPUs.

    ``none: `` and the reason if that is plain torch.
    """
    if kind == "cpu":
        return build.describe()
    off = switched_off()
    if not off and not torch.cuda.is_available():
        off = "torch sees no GPU"
    if reason := off or _trouble():
        return f"none: {reason}"
    way = ", rotating on tensor cores" if rotation() == TENSOR_CORES else ""
    return f"Triton {importlib.import_module('triton').__version__}{way}"


def rotation_on(device: torch.device) -> str:
    """What a rotation on `device` depends on: ranks that sum must have it in common.

    Butterflies and plain torch give the same bits everywhere. How a product is summed is up to the
    GPU and to Triton, and plain torch in its place would be a third way.

    Raises:
        LowbitError: The environment names another way.
    """
    if rotation() == BUTTERFLIES or device.type != "cuda":
        return rotation()
    return f"{TENSOR_CORES} ({torch.cuda.get_device_name(device)}, {describe('cuda')})"


def can_rotate_on_tensor_cores(module: ModuleType) -> bool:
    """Whether `rotating_by` changes anything in a module that `kernels_for` gave."""
    return module.__name__ in (_TRITON[ROTATED], _TRITON[NORM])


def _kind(*tensors: Tensor) -> str | None:
    kinds = {tensor.device.type for tensor in tensors}
    return kinds.pop() if len(kinds) == 1 else None


def _trouble() -> str:
    """Why Triton does not serve here, said aloud once; empty if it does."""
    if _tried:
        return _tried[0]
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return ""  # no trial inside a graph
    with _lock:
        if not _tried:
            _tried.append(_try_out())
    return _tried[0]


def _try_out() -> str:
    rotation()  # a bad value is no trouble of Triton's
    try:
        _require_triton()
        _module(ROTATED).try_out("cuda")
    # Triton has no common class of errors: no compiler for its launcher, no ptxas, a driver that is
    # too old and a bug of its own all look different.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warnings.warn(
            f"megatron_lowbit: no GPU kernels ({reason}): codecs run in plain torch, many times "
            "slower. Repair Triton (3.5 or newer, which torch 2.9 brings), or set "
            f"{SWITCH}=0 to silence this.",
            RuntimeWarning,
            stacklevel=5,
        )
        return reason
    return ""


def _require_triton() -> None:
    version = importlib.import_module("triton").__version__
    if tuple(map(int, version.split(".")[:2])) < FIRST_TRITON:
        raise LowbitError(f"Triton {version} is older than {'.'.join(map(str, FIRST_TRITON))}")


@lru_cache
def _module(family: str) -> ModuleType:
    return importlib.import_module(_TRITON[family])
