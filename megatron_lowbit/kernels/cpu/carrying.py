"""Encoding with error feedback on CPUs: the work in ``carrying.c``, a row at a time.

The bits are those of `codecs.carry` and `codecs.rotated_hybrid`, the plain torch.
What arguments, results and errors are is in `megatron_lowbit.kernels`.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.kernels.cpu.calls import (
    DTYPES,
    check_payloads,
    function,
    pointer,
    readable,
    run_rows,
    takes_rows,
)
from megatron_lowbit.kernels.layout import row_bytes

_INT, _INT64, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class _Carry(ctypes.Structure):
    """`struct carry` of carrying.c."""

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
    """
    scale, index = encoding["scale"], encoding["bf16_index"]
    hidden, kept = scale.numel(), index.numel()
    partial = readable(partial, encoding["width"])
    tokens = len(partial)
    payload = _payload(tokens, encoding["body_bytes"], kept)
    room = _room_for(given)
    carry_of = _carries(taken, room, bounded, largest)
    call = function("encode_with_carry")
    settings: tuple = (hidden, encoding["block"], pointer(encoding["center"]), scale.data_ptr())
    settings += (decode_scale.data_ptr(), index.data_ptr(), kept)
    settings += (encoding["thresholds"].data_ptr(), levels.data_ptr())
    settings += (encoding["bits"], encoding["body_bytes"])

    def part(first: int, last: int) -> int:
        rows, stride = partial[first:], partial.stride(0) * partial.element_size()
        begin = (rows.data_ptr(), DTYPES[partial.dtype], stride, last - first)
        return call(*begin, *settings, payload[first:].data_ptr(), carry_of(first))

    run_rows(part, tokens, hidden)
    if room is not given:
        given.copy_(room)
    return payload


def reduce_encode_with_carry(
    payloads: Tensor,
    *,
    taken: Tensor | None,
    given: Tensor,
    bounded: Tensor | None,
    largest: float,
    center: Tensor | None,
    scale: Tensor,
    decode_scale: Tensor,
    bf16_index: Tensor,
    block: int,
    levels: Tensor,
    bits: int,
    body_bytes: int,
    thresholds: Tensor,
    sum_levels: Tensor,
    sum_bits: int,
    sum_body_bytes: int,
) -> Tensor:
    """`reduce_encode` with error feedback of the sum, which is turned back to features for it."""
    hidden, kept = scale.numel(), bf16_index.numel()
    payloads = check_payloads(payloads, row_bytes(body_bytes, kept + 1))
    ranks, tokens, row = payloads.shape
    payload = _payload(tokens, sum_body_bytes, kept)
    room = _room_for(given)
    carry_of = _carries(taken, room, bounded, largest)
    call = function("reduce_encode_with_carry")
    settings: tuple = (hidden, block, pointer(center), scale.data_ptr(), decode_scale.data_ptr())
    settings += (bf16_index.data_ptr(), kept, levels.data_ptr(), bits, body_bytes)
    settings += (thresholds.data_ptr(), sum_levels.data_ptr(), sum_bits, sum_body_bytes)
    source, rank_stride = payloads.data_ptr(), payloads.stride(0)

    def part(first: int, last: int) -> int:
        begin = (source + first * row, rank_stride, ranks, last - first)
        return call(*begin, *settings, payload[first:].data_ptr(), carry_of(first))

    run_rows(part, tokens, hidden * ranks)
    if room is not given:
        given.copy_(room)
    return payload


def _payload(tokens: int, body_bytes: int, kept: int) -> Tensor:
    return torch.empty((tokens, row_bytes(body_bytes, kept + 1)), dtype=torch.uint8)


def _room_for(given: Tensor) -> Tensor:
    """Where C can write the error: `given`, or what is to be copied there."""
    return given if takes_rows(given) else torch.empty(given.shape, dtype=given.dtype)


def _carries(
    taken: Tensor | None, given: Tensor, bounded: Tensor | None, largest: float
) -> Callable[[int], Any]:
    """First row -> the `struct carry` of the rows from there on, for a call."""
    if taken is not None:
        taken = readable(taken, given.shape[1])

    def carry_of(first: int) -> Any:
        carry = _Carry(
            taken=None if taken is None else taken[first:].data_ptr(),
            taken_stride=0 if taken is None else taken.stride(0) * taken.element_size(),
            given=given[first:].data_ptr(),
            given_stride=given.stride(0) * given.element_size(),
            bounded=pointer(bounded),
            taken_dtype=0 if taken is None else DTYPES[taken.dtype],
            largest=largest,
        )
        return ctypes.byref(carry)

    return carry_of
