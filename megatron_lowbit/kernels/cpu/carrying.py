"""Encoding with error feedback on CPUs: the work in ``rotated_hybrid.c``, a row at a time.

The bits are those of `codecs.carry` and `codecs.rotated_hybrid`, the plain torch.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.kernels.cpu.calls import DTYPES, function, pointer, readable, run_rows
from megatron_lowbit.kernels.layout import row_bytes

_INT, _INT64, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class _Carry(ctypes.Structure):
    """`struct carry` of rotated_hybrid.c."""

    _fields_ = (
        ("taken", _POINTER),
        ("taken_stride", _INT64),
        ("given", _POINTER),
        ("given_stride", _INT64),
        ("bounded", _POINTER),
        ("taken_dtype", _INT),
        ("largest", ctypes.c_float),
    )


def encode_with_carry(
    partial: Tensor,
    *,
    taken: Tensor | None,
    given: Tensor,
    bounded: Tensor | None,
    largest: float,
    decode_scale: Tensor,
    levels: Tensor,
    **encoding: Any,
) -> Tensor:
    """`encode` with error feedback (`codecs.carry`), in one pass over the rows.

    Args:
        partial: As for `encode`, without a folded weight.
        taken: Floating point ``[tokens, hidden]``; nothing is if None.
        given: BF16 ``[tokens, hidden]``, rows contiguous; it may be `taken`.
        bounded: int64 ``[1]``, counts rows that were scaled down.
        largest: Of a row: the most that its error may be.
        decode_scale: fp32 ``[hidden]``, contiguous, as for `decode_sum`.
        levels: fp32 ``[2**bits]``, ascending.
        encoding: What `encode` takes.

    Returns:
        ``uint8 [tokens, row_bytes]``, contiguous.
    """
    scale, index = encoding["scale"], encoding["bf16_index"]
    hidden, kept = scale.numel(), index.numel()
    partial = readable(partial, encoding["width"])
    if taken is not None:
        taken = readable(taken, hidden)
    tokens = len(partial)
    size = (tokens, row_bytes(encoding["body_bytes"], kept + 1))
    payload = torch.empty(size, dtype=torch.uint8)
    call = function("encode_with_carry")
    settings: tuple = (hidden, encoding["block"], pointer(encoding["center"]), scale.data_ptr())
    settings += (decode_scale.data_ptr(), index.data_ptr(), kept)
    settings += (encoding["thresholds"].data_ptr(), levels.data_ptr())
    settings += (encoding["bits"], encoding["body_bytes"])

    def part(first: int, last: int) -> int:
        carry = _Carry(
            taken=None if taken is None else taken[first:].data_ptr(),
            taken_stride=0 if taken is None else taken.stride(0) * taken.element_size(),
            given=given[first:].data_ptr(),
            given_stride=given.stride(0) * given.element_size(),
            bounded=pointer(bounded),
            taken_dtype=0 if taken is None else DTYPES[taken.dtype],
            largest=largest,
        )
        rows, stride = partial[first:], partial.stride(0) * partial.element_size()
        begin = (rows.data_ptr(), DTYPES[partial.dtype], stride, last - first)
        return call(*begin, *settings, payload[first:].data_ptr(), ctypes.byref(carry))

    run_rows(part, tokens, hidden)
    return payload
