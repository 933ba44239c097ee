"""The rows of ``rotated-hybrid`` and ``shaped-hybrid`` in Triton: what a program does with a token.

Pieces of kernels: `rotated` runs each of them alone, one program a token, and
`symmetric` puts the sending between them. Pointers are those of the token's row.
"""

import triton
import triton.language as tl

from megatron_lowbit.kernels.triton.parts import values as parts
from megatron_lowbit.kernels.triton.parts.rotate import rotate


@triton.jit
def encode_row(
    partial,
    column_stride,
    center,
    scale,
    index,
    kept,
    cells,
    payload,
    HIDDEN: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    LOG_TILE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Write a token's partial into its row of the payload.

    Args:
        partial: fp32, fp16 or the bits of BF16, `column_stride` apart.
        column_stride: See there.
        center: fp32 [hidden], or None.
        scale: fp32 [hidden], 0 for a BF16 feature.
        index: int64 [kept].
        kept: BF16 features.
        cells: int64 [CELLS].
        payload: The bytes of the token's row.
        HIDDEN: Features of the body's row.
        LOG_BLOCK: Of the values that the rotation mixes; 0 for a row that comes rotated.
        KEPT: A power of two, at least `kept`; or 0.
        BODY_BYTES: Of the packed codes.
        BITS: Of a code.
        STEPS: Of `cells`.
        CELLS: Of `cells`.
        LOG_TILE: Of the tile.
        DOT: As for `parts.rotate.rotate`.
    """
    feature = tl.arange(0, 1 << LOG_TILE)
    inside = feature < HIDDEN
    row = parts.load_floats(partial + feature.to(tl.int64) * column_stride, inside)
    if center is not None:
        row -= tl.load(center + feature, mask=inside, other=0.0)
    factor = tl.load(scale + feature, mask=inside, other=0.0)
    row = tl.where(factor == 0, 0.0, row * factor)
    finite = 1
    if KEPT:
        floats = payload + BODY_BYTES + BODY_BYTES % 2
        finite = parts.write_kept(partial, column_stride, index, kept, floats, KEPT)
    row = rotate(row, LOG_TILE, LOG_BLOCK, DOT)
    parts.write_body(
        row, finite, payload, kept, cells, HIDDEN, BODY_BYTES, BITS, STEPS, CELLS, LOG_TILE
    )


@triton.jit
def decode_row(
    payloads,
    rank_stride,
    ranks,
    center,
    scale,
    index,
    kept,
    levels,
    out,
    out_column_stride,
    HIDDEN: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    NATIVE: tl.constexpr,
    LOG_TILE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Sum a token's rows of all ranks and turn the sum back.

    Args:
        payloads: The bytes of the token's row of rank 0.
        rank_stride: Bytes to the next rank's.
        ranks: How many.
        center: fp32 [hidden], or None.
        scale: fp32 [hidden].
        index: int64 [kept].
        kept: BF16 features.
        levels: fp32 [2**BITS].
        out: fp32, fp16 or the bits of BF16, `out_column_stride` apart.
        out_column_stride: See there.
        HIDDEN: As for `encode_row`, and so all others but:
        NATIVE: As for `parts.values.store_floats`.
    """
    row = parts.sum_rows(payloads, rank_stride, ranks, kept, levels, BODY_BYTES, BITS, LOG_TILE)
    row = rotate(row, LOG_TILE, LOG_BLOCK, DOT)
    feature = tl.arange(0, 1 << LOG_TILE)
    inside = feature < HIDDEN
    row *= tl.load(scale + feature, mask=inside, other=0.0)
    if center is not None:
        row += tl.load(center + feature, mask=inside, other=0.0)
    place = out + feature.to(tl.int64) * out_column_stride
    parts.store_floats(place, row, inside, NATIVE)
    if KEPT:
        floats = payloads + BODY_BYTES + BODY_BYTES % 2
        total = parts.sum_kept(floats, rank_stride, ranks, kept, KEPT)
        j = tl.arange(0, KEPT)
        place = out + tl.load(index + j, mask=j < kept, other=0) * out_column_stride
        tl.debug_barrier()  # the whole row was written, unmasked, to be written in wide pieces
        parts.store_floats(place, total, j < kept, NATIVE)


@triton.jit
def reduce_row(
    payloads,
    rank_stride,
    ranks,
    kept,
    levels,
    cells,
    payload,
    HIDDEN: tl.constexpr,
    KEPT: tl.constexpr,
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    SUM_BODY_BYTES: tl.constexpr,
    SUM_BITS: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    """Sum a token's rows of all ranks and write the sum, rotated as it is, into a row.

    Arguments are those of `decode_row` and `encode_row`; those with SUM are the new row's.
    """
    row = parts.sum_rows(payloads, rank_stride, ranks, kept, levels, BODY_BYTES, BITS, LOG_TILE)
    row = tl.where(tl.arange(0, 1 << LOG_TILE) < HIDDEN, row, 0.0)
    finite = 1
    if KEPT:
        floats = payloads + BODY_BYTES + BODY_BYTES % 2
        j = tl.arange(0, KEPT)
        bits = parts.wire_bits(parts.sum_kept(floats, rank_stride, ranks, kept, KEPT))
        parts.store_bytes(payload + SUM_BODY_BYTES + SUM_BODY_BYTES % 2 + 2 * j, bits, j < kept, 2)
        finite = parts.all_finite(bits, j < kept)
    parts.write_body(
        row,
        finite,
        payload,
        kept,
        cells,
        HIDDEN,
        SUM_BODY_BYTES,
        SUM_BITS,
        STEPS,
        CELLS,
        LOG_TILE,
    )
