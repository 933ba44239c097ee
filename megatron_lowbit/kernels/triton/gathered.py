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
def _values(
    payload,
    kept,
    levels,
    scale,
    feature,
    inside,
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    """fp32 [1 << LOG_TILE]: a rank's body, what its codes stand for times its own scales.

    With `levels` that is a level times the token's scale. Without them it is the code as a signed
    integer, and NaN for the lowest, which stands for what is not finite.
    """
    if levels is None:
        half: tl.constexpr = 1 << (BITS - 1)
        codes = parts.unpack(payload, BODY_BYTES, BITS, LOG_TILE)
        values = tl.where(codes >= half, codes - 2 * half, codes).to(tl.float32)
        values = tl.where(codes == half, float("nan"), values)
    else:
        values = parts.row_values(payload, kept, levels, BODY_BYTES, BITS, LOG_TILE)
    return values * tl.load(scale + feature, mask=inside, other=0.0)


@triton.jit
def _decode_sum(
    payloads,  # uint8 [ranks, tokens, row bytes]
    rank_stride,
    row_stride,
    ranks,
    center,  # fp32 [hidden]: of the sum, or None
    scale,  # fp32 [ranks, hidden]
    body_index,  # int64 [BODY]
    bf16_index,  # int64 [kept]
    kept,
    levels,  # fp32 [2**BITS], or None
    out,  # fp32, fp16 or the bits of BF16 [tokens, hidden]
    out_row_stride,
    out_column_stride,
    HIDDEN: tl.constexpr,
    BODY: tl.constexpr,
    KEPT: tl.constexpr,
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    NATIVE: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    payloads += token * row_stride
    out += token * out_row_stride
    feature, inside = features(body_index, BODY, LOG_TILE)
    total = _values(payloads, kept, levels, scale, feature, inside, BODY_BYTES, BITS, LOG_TILE)
    row = payloads
    for _ in range(1, ranks):
        row += rank_stride
        scale += HIDDEN
        total += _values(row, kept, levels, scale, feature, inside, BODY_BYTES, BITS, LOG_TILE)
    if center is not None:
        total += tl.load(center + feature, mask=inside, other=0.0)
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
    out: Tensor,
    payloads: Tensor,
    row_bytes: int,
    *,
    center: Tensor | None = None,
    scale: Tensor,
    body_index: Tensor,
    bf16_index: Tensor,
    levels: Tensor | None = None,
    bits: int,
    body_bytes: int,
) -> None:
    """Sum payloads of `row_bytes` a row into `out`.

    Args:
        scale: fp32 ``[at least ranks, hidden]``, contiguous.
        levels: None: codes are signed integers.
        bits: 2 to 8.

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
        _decode_sum,
        tokens,
        tile,
        payloads,
        *(payloads, *payloads.stride()[:2], ranks),
        *(center, scale, body_index, bf16_index, kept, levels, target, *target.stride()),
        HIDDEN=hidden,
        BODY=body_index.numel(),
        KEPT=power_of_two(kept),
        BODY_BYTES=body_bytes,
        BITS=bits,
        NATIVE=is_compiled(_decode_sum),
    )
