"""The sum of `rotated`, and what a layer does next with it, in the same pass.

A token's row is decoded, summed and turned back as there, then bias and residual are added and
RMSNorm is applied, while it is in registers. At 4 bits and for each value it moves 0.5 bytes a rank
and 2 of the residual in, and 4 out; apart, the sum would be written, read and written once more.
What arguments, results and errors are is in `megatron_lowbit.kernels`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels.layout import row_bytes
from megatron_lowbit.kernels.triton.launching import (
    Tile,
    as_bits,
    check_payloads,
    dot_type,
    is_compiled,
    launch,
    power_of_two,
)
from megatron_lowbit.kernels.triton.parts import values as parts
from megatron_lowbit.kernels.triton.parts.rotate import rotate


@triton.jit
def _add(row, bias, residual, feature, residual_stride, mask):
    """fp32 `row` of these features with bias and residual, where there are any."""
    if bias is not None:
        row += parts.load_floats(bias + feature, mask)
    if residual is not None:
        row += parts.load_floats(residual + feature.to(tl.int64) * residual_stride, mask)
    return row


@triton.jit
def _decode_sum_norm(
    payloads,  # uint8 [ranks, tokens, row bytes]
    rank_stride,
    row_stride,
    ranks,
    residual,  # fp32, fp16 or the bits of BF16 [tokens, hidden], or None
    residual_row_stride,
    residual_column_stride,
    bias,  # fp32, fp16 or the bits of BF16 [hidden], or None
    weight,  # fp32, fp16 or the bits of BF16 [hidden]
    epsilon,
    center,  # fp32 [hidden], or None
    scale,  # fp32 [hidden], 0 for a BF16 feature
    index,  # int64 [kept]
    kept,
    levels,  # fp32 [2**BITS]
    normed,  # as weight, [tokens, hidden]
    total,  # as weight, [tokens, hidden]
    HIDDEN: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    LOG_KEPT: tl.constexpr,  # of a power of two, at least `kept`; or -1
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    NATIVE: tl.constexpr,
    LOG_TILE: tl.constexpr,
    DOT: tl.constexpr,  # as for `parts.rotate.rotate`
):
    token = tl.program_id(0).to(tl.int64)  # offsets may pass 2**31
    payloads += token * row_stride
    normed += token * HIDDEN
    total += token * HIDDEN
    if residual is not None:
        residual += token * residual_row_stride
    feature = tl.arange(0, 1 << LOG_TILE)
    inside = feature < HIDDEN
    row = parts.sum_rows(payloads, rank_stride, ranks, kept, levels, BODY_BYTES, BITS, LOG_TILE)
    row = rotate(row, LOG_TILE, LOG_BLOCK, DOT)
    factor = tl.load(scale + feature, mask=inside, other=0.0)
    row *= factor
    if center is not None:
        row += tl.load(center + feature, mask=inside, other=0.0)
    row = _add(row, bias, residual, feature, residual_column_stride, inside)
    row = tl.where(factor == 0, 0.0, row)
    square = parts.sum_of_squares(row, LOG_TILE)
    if LOG_KEPT >= 0:
        j = tl.arange(0, 1 << LOG_KEPT)
        real = j < kept
        floats = payloads + BODY_BYTES + BODY_BYTES % 2
        features = parts.sum_kept(floats, rank_stride, ranks, kept, 1 << LOG_KEPT)
        place = tl.load(index + j, mask=real, other=0)
        features = _add(features, bias, residual, place, residual_column_stride, real)
        features = tl.where(real, features, 0.0)
        square += parts.sum_of_squares(features, LOG_KEPT)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, HIDDEN + 0.0) + epsilon))
    parts.store_floats(total + feature, row, inside, NATIVE)
    gain = parts.load_floats(weight + feature, inside)
    parts.store_floats(normed + feature, row * inverse * gain, inside, NATIVE)
    if LOG_KEPT >= 0:
        gain = parts.load_floats(weight + place, real)
        tl.debug_barrier()  # whole rows were written, unmasked, to be written in wide pieces
        parts.store_floats(total + place, features, real, NATIVE)
        parts.store_floats(normed + place, features * inverse * gain, real, NATIVE)


@torch.library.custom_op("megatron_lowbit::rotated_decode_sum_norm", mutates_args=())
def decode_sum_norm(
    payloads: Tensor,
    weight: Tensor,
    epsilon: float,
    residual: Tensor | None,
    bias: Tensor | None,
    center: Tensor | None,
    scale: Tensor,
    bf16_index: Tensor,
    block: int,
    levels: Tensor,
    bits: int,
    body_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Sum the partials of all ranks, add bias and residual, and normalize.

    Args:
        weight: BF16, fp16 or fp32 ``[hidden]``, contiguous: RMSNorm's.
        epsilon: RMSNorm's.
        residual: BF16, fp16 or fp32 ``[tokens, hidden]``, any strides.
        bias: BF16, fp16 or fp32 ``[hidden]``, contiguous.
        bits: 2 to 6.

    Returns:
        What is normalized and what it was before, ``[tokens, hidden]`` in the type of `weight`.
    """
    hidden, kept = scale.numel(), bf16_index.numel()
    tile = Tile.of(hidden)
    payloads = check_payloads(payloads, row_bytes(body_bytes, kept + 1))
    ranks, tokens, _ = payloads.shape
    if residual is not None and residual.shape != (tokens, hidden):
        raise LowbitError(f"a residual is [{tokens}, {hidden}], got {list(residual.shape)}")
    normed, total = _new(payloads, weight), _new(payloads, weight)
    residual = None if residual is None else as_bits(residual)
    launch(
        _decode_sum_norm,
        tokens,
        tile,
        payloads,
        *(payloads, *payloads.stride()[:2], ranks),
        *(residual, *((0, 0) if residual is None else residual.stride())),
        *(None if bias is None else as_bits(bias), as_bits(weight), epsilon),
        *(center, scale, bf16_index, kept, levels, as_bits(normed), as_bits(total)),
        HIDDEN=hidden,
        LOG_BLOCK=block.bit_length() - 1,
        LOG_KEPT=power_of_two(kept).bit_length() - 1,
        BODY_BYTES=body_bytes,
        BITS=bits,
        NATIVE=is_compiled(_decode_sum_norm),
        DOT=dot_type(_decode_sum_norm),
    )
    return normed, total


@decode_sum_norm.register_fake
def _(payloads, weight, *_, **__):
    return _new(payloads, weight), _new(payloads, weight)


def _new(payloads: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((payloads.shape[1], weight.shape[0]))
