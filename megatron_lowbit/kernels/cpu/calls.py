"""Calling the library of C kernels: arguments, tensors as C reads them, threads."""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels.cpu.build import library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as `enum dtype` in numbers.h
_VALUES_A_THREAD = 1 << 17  # about 0.1 ms of work, several times what handing it over costs

_INT, _INT64, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_ROWS = [_POINTER, _INT64, _INT64, _INT64, _INT64]  # payloads, stride, ranks, tokens, hidden
_FEATURES = [_POINTER, _POINTER, _POINTER, _INT64]  # center, scale, BF16 index, its length
_CODES = [_POINTER, _INT, _INT64]  # levels or thresholds, bits, bytes of the codes of a row
_ARGUMENTS = {
    "encode": [_POINTER, _INT, *[_INT64] * 4, *_FEATURES, *_CODES, _POINTER],
    "encode_with_carry": [
        *[_POINTER, _INT, *[_INT64] * 4, _POINTER, _POINTER, _POINTER, _POINTER, _INT64],
        *[_POINTER, _POINTER, _INT, _INT64, _POINTER, _POINTER],
    ],
    "decode_sum": [*_ROWS, _INT64, *_FEATURES, *_CODES, _POINTER, _INT, _INT64],
    "reduce_encode": [*_ROWS, _INT64, *_CODES, *_CODES, _POINTER],
    "reduce_encode_with_carry": [
        *[*_ROWS, _INT64, _POINTER, _POINTER, _POINTER, _POINTER, _INT64, *_CODES],
        *[_POINTER, _POINTER, _INT, _INT64, _POINTER, _POINTER],
    ],
}


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def readable(values: Tensor, width: int) -> Tensor:
    """``[tokens, width]`` as C reads it: a known dtype, features side by side.

    Raises:
        LowbitError: Another shape.
    """
    if values.ndim != 2 or values.shape[1] != width:
        raise LowbitError(f"a partial is [tokens, {width}], got {list(values.shape)}")
    if values.dtype not in DTYPES:
        values = values.float()
    return values if values.stride(1) == 1 else values.contiguous()


def takes_rows(values: Tensor) -> bool:
    """Whether C can write rows there: features side by side, and no row over another."""
    tokens, width = values.shape
    return values.stride(1) == 1 and (values.stride(0) >= width or tokens < 2)


def check_payloads(payloads: Tensor, row_bytes: int) -> Tensor:
    """The payloads with the rows of a rank side by side; the ranks may lie anywhere."""
    shape = payloads.shape
    if payloads.dtype != torch.uint8 or len(shape) != 3 or shape[2] != row_bytes or not shape[0]:
        wanted = f"uint8 [ranks, tokens, {row_bytes}]"
        raise LowbitError(f"payloads are {wanted}, got {payloads.dtype} {list(shape)}")
    together = payloads.stride(2) == 1 and payloads.stride(1) == row_bytes
    return payloads if together else payloads.contiguous()


def function(name: str) -> Callable[..., int]:
    """A function of the library; ctypes keeps it as an attribute of the library."""
    function = getattr(library(), name)
    if function.argtypes is None:
        function.argtypes = _ARGUMENTS[name]
    return function


def run_rows(part: Callable[[int, int], int], tokens: int, values_per_token: int) -> None:
    """Call `part(first, last)` for all tokens, in several threads where that pays."""
    threads = min(torch.get_num_threads(), tokens, tokens * values_per_token // _VALUES_A_THREAD)
    if threads < 2:
        failed = part(0, tokens)
    else:
        edges = [tokens * i // threads for i in range(threads + 1)]
        others = [_pool(threads - 1).submit(part, *edges[i : i + 2]) for i in range(1, threads)]
        failed = part(*edges[:2])
        failed = sum((other.result() for other in others), failed)
    if failed:
        raise MemoryError("no memory for a row of scratch")


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="megatron_lowbit")


# A forked child has none of its parent's threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
