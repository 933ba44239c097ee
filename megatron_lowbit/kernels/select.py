"""Which kernels serve which tensors: C on CPUs, Triton on GPUs, or none.

The only place that knows. A family of kernels serves one codec or several; its modules for CPUs and
GPUs have the same functions. Triton is imported when the first GPU tensor comes, and tried out on
that device: what is missing or broken is said once, and plain torch does the work, with the same
bits. The trial waits for the device, so make one call before a CUDA graph captures others, as
kernels that are compiled at first use need anyway.
"""

import importlib
import threading
import warnings
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from megatron_lowbit.kernels import build, rotated_hybrid
from megatron_lowbit.kernels.build import SWITCH

ROTATED, STATIC, SCALED, NORM = "rotated", "static", "scaled", "norm"
_TRITON = {
    ROTATED: "megatron_lowbit.kernels.triton_rotated",
    STATIC: "megatron_lowbit.kernels.triton_static",
    SCALED: "megatron_lowbit.kernels.triton_scaled",
    NORM: "megatron_lowbit.kernels.triton_norm",
}
_lock = threading.Lock()
_tried: list[str] = []  # what the trial said, once there was one


def kernels_for(family: str, *tensors: Tensor) -> ModuleType | None:
    """The module of kernels for these tensors, or None where plain torch must do.

    Args:
        family: `ROTATED`, `STATIC`, `SCALED` or `NORM`.
        tensors: All on one device, else there is none.
    """
    kind = _kind(*tensors)
    if kind == "cuda":
        return None if build.switched_off() or _trouble() else _module(family)
    has_c = kind == "cpu" and family == ROTATED and build.library() is not None
    return rotated_hybrid if has_c else None


def describe(kind: str = "cpu") -> str:
    """What the codecs run on CPUs (``C (gcc 12.2.0)``) or, asked for ``cuda``, on GPUs.

    ``none: `` and the reason if that is plain torch.
    """
    if kind == "cpu":
        return build.describe()
    off = build.switched_off()
    if not off and not torch.cuda.is_available():
        off = "torch sees no GPU"
    reason = off or _trouble()
    return (
        f"none: {reason}" if reason else f"Triton {importlib.import_module('triton').__version__}"
    )


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
    try:
        _module(ROTATED).try_out("cuda")
    # Triton has no common class of errors: no compiler for its launcher, no ptxas, a driver that is
    # too old and a bug of its own all look different.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warnings.warn(
            f"megatron_lowbit: no GPU kernels ({reason}): codecs run in plain torch, many times "
            f"slower. Repair Triton (pip install triton), or set {SWITCH}=0 to silence this.",
            RuntimeWarning,
            stacklevel=5,
        )
        return reason
    return ""


@lru_cache
def _module(family: str) -> ModuleType:
    return importlib.import_module(_TRITON[family])
