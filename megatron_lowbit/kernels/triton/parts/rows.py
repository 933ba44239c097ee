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

    Where `given` is None, `decode_scale` and `levels` may be.
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
    """Sum a token's rows of all ranks and turn the sum back."""
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
