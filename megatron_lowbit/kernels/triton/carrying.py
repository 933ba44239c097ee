"""Encoding with error feedback in Triton: one program a token, one pass over its data.

The bits are those of `codecs.carry` and `codecs.rotated_hybrid`, the plain torch; `parts.carries`
says how. Bytes moved a value at 4 bits: encode 2 in, 0.5 out, and a carry's 2 in and 2 out;
reduce_encode 0.5 in for each rank, 0.5 out, and the same for its carry.

A carry may be written where the one before lay: a program reads its row before.
What arguments, results and errors are is in `megatron_lowbit.kernels`.
"""

import torch
from torch import Tensor

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels.layout import row_bytes
from megatron_lowbit.kernels.triton.launching import new_payload
from megatron_lowbit.kernels.triton.rotated_launching import launch_encode, launch_reduce


@torch.library.custom_op(
    "megatron_lowbit::rotated_encode_with_carry", mutates_args=("given", "bounded")
)
def encode_with_carry(
    partial: Tensor,
    taken: Tensor | None,
    given: Tensor | None,
    bounded: Tensor | None,
    largest: float,
    width: int,
    center: Tensor | None,
    scale: Tensor,
    decode_scale: Tensor,
    bf16_index: Tensor,
    block: int,
    thresholds: Tensor,
    levels: Tensor,
    bits: int,
    body_bytes: int,
) -> Tensor:
    """`rotated.encode` with error feedback (`codecs.carry`).

    Args:
        width: Hidden size. A folded weight's rows have no features to carry.

    Raises:
        LowbitError: A tensor has another shape or type, the rows come rotated, or there are too
            many features.
    """
    if width != scale.numel() or block != width & -width:
        raise LowbitError("a folded weight's error is rotated: it cannot be carried on")
    encoding = (center, scale, bf16_index, block, thresholds, bits, body_bytes)
    carry = (taken, given, bounded, largest)
    return launch_encode(partial, width, *encoding, carry, decode_scale, levels)


@encode_with_carry.register_fake
def _(
    partial, taken, given, bounded, largest, width, center, scale, decode_scale, bf16_index, *rest
):
    row = row_bytes(rest[-1], bf16_index.numel() + 1)
    return new_payload(partial, partial.shape[0], row)


@torch.library.custom_op(
    "megatron_lowbit::rotated_reduce_encode_with_carry", mutates_args=("given", "bounded")
)
def reduce_encode_with_carry(
    payloads: Tensor,
    taken: Tensor | None,
    given: Tensor | None,
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
    """`rotated.reduce_encode` with error feedback of the sum, which is turned back for it."""
    hidden, kept = scale.numel(), bf16_index.numel()
    received, written = (levels, bits, body_bytes), (thresholds, sum_bits, sum_body_bytes)
    turning, carry = (center, scale, bf16_index, block), (taken, given, bounded, largest)
    summed = (*received, *written, *turning)
    return launch_reduce(payloads, hidden, kept, *summed, carry, decode_scale, sum_levels)


@reduce_encode_with_carry.register_fake
def _(payloads, taken, given, bounded, largest, center, scale, decode_scale, bf16_index, *rest):
    row = row_bytes(rest[-1], bf16_index.numel() + 1)
    return new_payload(payloads, payloads.shape[1], row)
