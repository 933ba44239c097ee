"""Rows whose body leaves out the BF16 features: what `static` and `scaled` share.

The body is gathered and scattered by its table of features, 8 bytes a feature from the caches: the
values of a row are neighbours but for the gaps that the BF16 features leave.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels.triton.launching import (
    Tile,
    as_bits,
    check_partial,
    check_payloads,
    is_compiled,
    launch,
    new_payload,
    power_of_two,
)
from megatron_lowbit.kernels.triton.parts import values as parts


@triton.jit
def features(body_index, BODY: tl.constexpr, LOG_TILE: tl.constexpr):
    """int64 [1 << LOG_TILE]: the feature at each place of a body, 0 behind it; and where it is."""
    place = tl.arange(0, 1 << LOG_TILE)
    inside = place < BODY
    return tl.load(body_index + place, mask=inside, other=0), inside


@triton.jit
def write_kept(
    partial, column_stride, index, kept, payload, BODY_BYTES: tl.constexpr, KEPT: tl.constexpr
):
    """Write a token's BF16 features into its row; gives 1 if all of them are finite, else 0."""
    feature, mask = parts.index_of(index, kept, KEPT)
    values = parts.load_floats(partial + feature * column_stride, mask)
    return parts.write_kept(values, kept, payload + BODY_BYTES + BODY_BYTES % 2, KEPT)


@triton.jit
def store_sum(
    total,
    feature,
    inside,
    payloads,
    rank_stride,
    ranks,
    bf16_index,
    kept,
    out,
    out_column_stride,
    BODY_BYTES: tl.constexpr,
    KEPT: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Put a token's sum in place: its body, and the BF16 features summed here.

    Args:
        total: fp32 [1 << LOG_TILE], the sum of the body.
        feature: As from `features`.
        inside: As from `features`.
        out: fp32, fp16 or the bits of BF16, `out_column_stride` apart.
    """
    parts.store_floats(out + feature * out_column_stride, total, inside, NATIVE)
    if KEPT:
        floats = payloads + BODY_BYTES + BODY_BYTES % 2
        total = parts.sum_kept(floats, rank_stride, ranks, kept, KEPT)
        feature, real = parts.index_of(bf16_index, kept, KEPT)
        parts.store_floats(out + feature * out_column_stride, total, real, NATIVE)


def launch_encode(
    kernel: Any,
    partial: Tensor,
    row_bytes: int,
    scale: Tensor,
    body_index: Tensor,
    bf16_index: Tensor,
    *more: object,
    **constants: int,
) -> Tensor:
    """Write a partial into a new payload of `row_bytes` a row.

    Args:
        kernel: Takes partial and its two strides, scale, body index, BF16 index and its length,
            payload, `row_bytes`, and `more`.
        partial: BF16, fp16 or fp32 ``[tokens, hidden]``, any strides.
        row_bytes: See above.
        scale: fp32 ``[hidden]``, contiguous.
        body_index: int64 ``[hidden - k]``, contiguous.
        bf16_index: int64 ``[k]``, contiguous.
        more: Other arguments of the kernel.
        constants: Its constants, but those of the indices.

    Raises:
        LowbitError: `partial` has another shape or type, or too many features.
    """
    hidden, kept = scale.numel(), bf16_index.numel()
    tile, values = Tile.of(hidden), check_partial(partial, hidden)
    payload = new_payload(partial, len(partial), row_bytes)
    launch(
        kernel,
        len(partial),
        tile,
        partial,
        *(values, *values.stride(), scale, body_index, bf16_index, kept, payload, row_bytes, *more),
        BODY=body_index.numel(),
        KEPT=power_of_two(kept),
        **constants,
    )
    return payload


def launch_decode_sum(
    kernel: Any,
    out: Tensor,
    payloads: Tensor,
    row_bytes: int,
    scale: Tensor,
    body_index: Tensor,
    bf16_index: Tensor,
    *more: object,
    **constants: int,
) -> None:
    """Sum payloads of `row_bytes` a row into `out`.

    Args:
        kernel: Takes payloads, their strides of ranks and rows, their number, scale, body index,
            BF16 index and its length, out and its two strides, and `more`.
        out: BF16, fp16 or fp32 ``[tokens, hidden]``, any strides.
        payloads: ``uint8 [ranks, tokens, row_bytes]``.
        row_bytes: See above.
        scale: fp32 ``[at least ranks, hidden]``, contiguous.
        body_index: int64 ``[hidden - k]``, contiguous.
        bf16_index: int64 ``[k]``, contiguous.
        more: Other arguments of the kernel.
        constants: Its constants, but those of the shapes.

    Raises:
        LowbitError: A tensor has another shape or type, or too many features.
    """
    hidden, kept = scale.shape[1], bf16_index.numel()
    tile = Tile.of(hidden)
    payloads = check_payloads(payloads, row_bytes)
    ranks, tokens, _ = payloads.shape
    if out.shape != (tokens, hidden) or len(scale) < ranks:
        raise LowbitError(
            f"a sum of {ranks} ranks is [{tokens}, {hidden}] with scales for each of them, got "
            f"{list(out.shape)} and scales for {len(scale)}"
        )
    target = as_bits(out)
    launch(
        kernel,
        tokens,
        tile,
        payloads,
        *(payloads, *payloads.stride()[:2], ranks),
        *(scale, body_index, bf16_index, kept, target, *target.stride(), *more),
        HIDDEN=hidden,
        BODY=body_index.numel(),
        KEPT=power_of_two(kept),
        NATIVE=is_compiled(kernel),
        **constants,
    )
