"""The rows of ``rotated-hybrid`` and ``shaped-hybrid`` in Triton: what a program does with a token.

Pieces of kernels: `rotated` and `carrying` run each of them alone, one program a token, and
`symmetric` puts the sending between them. Pointers are those of the token's row. Sums that are sent
are in `reduce`, what is kept of a row with error feedback in `carries`.
"""

import triton
import triton.language as tl

from megatron_lowbit.kernels.triton.parts import carries as carries
from megatron_lowbit.kernels.triton.parts import values as parts
from megatron_lowbit.kernels.triton.parts.rotate import turned, turned_back


@triton.jit
def encode_row(
    partial,
    column_stride,
    taken,
    taken_column_stride,
    given,
    given_column_stride,
    bounded,
    largest,
    center,
    scale,
    decode_scale,
    index,
    kept,
    cells,
    levels,
    payload,
    HIDDEN: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    NATIVE: tl.constexpr,
    LOG_TILE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Write a token's partial, and what is taken, into its row of the payload; keep what is missed.

    Args:
        partial: fp32, fp16 or the bits of BF16, `column_stride` apart.
        column_stride: See there.
        taken: The same, `taken_column_stride` apart; None for nothing.
        taken_column_stride: See there.
        given: As for `carries.give`, and so all up to `largest`; None to keep nothing.
        given_column_stride: See there.
        bounded: See there.
        largest: See there.
        center: fp32 [hidden], or None.
        scale: fp32 [hidden], 0 for a BF16 feature.
        decode_scale: As for `decode_row`; None to keep nothing.
        index: int64 [kept].
        kept: BF16 features.
        cells: int64 [CELLS].
        levels: fp32 [2**BITS]; None to keep nothing.
        payload: The bytes of the token's row.
        HIDDEN: Features of the body's row.
        LOG_BLOCK: Of the values that the rotation mixes; 0 for a row that comes rotated.
        KEPT: A power of two, at least `kept`; or 0.
        BODY_BYTES: Of the packed codes.
        BITS: Of a code.
        STEPS: Of `cells`.
        CELLS: Of `cells`.
        NATIVE: As for `parts.values.store_floats`.
        LOG_TILE: Of the tile.
        DOT: As for `parts.rotate.rotate`.
    """
    feature = tl.arange(0, 1 << LOG_TILE)
    inside = feature < HIDDEN
    wanted = parts.load_wanted(partial, column_stride, taken, taken_column_stride, feature, inside)
    finite = 1
    if KEPT:
        place, real = parts.index_of(index, kept, KEPT)
        apart = parts.load_wanted(partial, column_stride, taken, taken_column_stride, place, real)
        finite = parts.write_kept(apart, kept, payload + BODY_BYTES + BODY_BYTES % 2, KEPT)
    row = turned(wanted, center, scale, HIDDEN, LOG_BLOCK, LOG_TILE, DOT)
    codes, size = parts.write_body(
        row, finite, payload, kept, cells, HIDDEN, BODY_BYTES, BITS, STEPS, CELLS, LOG_TILE
    )
    if given is not None:
        carries.give(
            wanted,
            codes,
            size,
            given,
            given_column_stride,
            bounded,
            largest,
            center,
            decode_scale,
            levels,
            HIDDEN,
            LOG_BLOCK,
            KEPT,
            NATIVE,
            LOG_TILE,
            DOT,
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
    feature = tl.arange(0, 1 << LOG_TILE)
    inside = feature < HIDDEN
    row = parts.sum_rows(payloads, rank_stride, ranks, kept, levels, BODY_BYTES, BITS, LOG_TILE)
    row = turned_back(row, center, scale, HIDDEN, LOG_BLOCK, LOG_TILE, DOT)
    place = out + feature.to(tl.int64) * out_column_stride
    parts.store_floats(place, row, inside, NATIVE)
    if KEPT:
        floats = payloads + BODY_BYTES + BODY_BYTES % 2
        total = parts.sum_kept(floats, rank_stride, ranks, kept, KEPT)
        place, real = parts.index_of(index, kept, KEPT)
        tl.debug_barrier()  # the whole row was written, unmasked, to be written in wide pieces
        parts.store_floats(out + place * out_column_stride, total, real, NATIVE)
