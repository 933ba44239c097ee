"""A sum of rotated rows that is sent on: what a program does with a token that its rank owns.

Without error feedback the sum is written as it is, rotated. With it the sum is turned back first,
since what is carried is features: the next sync point has other tables. Pieces as those of `rows`.
"""

import triton
import triton.language as tl

from megatron_lowbit.kernels.triton.parts import carries as carries
from megatron_lowbit.kernels.triton.parts import values as parts
from megatron_lowbit.kernels.triton.parts.rotate import turned, turned_back


@triton.jit
def reduce_row(
    payloads,
    rank_stride,
    ranks,
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
    levels,
    cells,
    sum_levels,
    payload,
    HIDDEN: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    SUM_BODY_BYTES: tl.constexpr,
    SUM_BITS: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    NATIVE: tl.constexpr,
    LOG_TILE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Sum a token's rows of all ranks and write the sum into a row; keep what is missed.

    Args:
        taken: Of the sum. Without a carry, taken or given, the sum is not turned back, and none of
            `center`, the scales, `index` and `sum_levels` is read.
        cells: Of the new row, as are `payload` and what has SUM in its name.
    """
    CARRY: tl.constexpr = taken is not None or given is not None
    feature = tl.arange(0, 1 << LOG_TILE)
    inside = feature < HIDDEN
    finite = 1
    if KEPT:
        floats = payloads + BODY_BYTES + BODY_BYTES % 2
        total = parts.sum_kept(floats, rank_stride, ranks, kept, KEPT)
        if CARRY:
            apart, is_apart = carries.put_apart(total, decode_scale, HIDDEN, LOG_TILE)
        if taken is not None:
            place, real = parts.index_of(index, kept, KEPT)
            total += parts.load_floats(taken + place * taken_column_stride, real)
        floats = payload + SUM_BODY_BYTES + SUM_BODY_BYTES % 2
        finite = parts.write_kept(total, kept, floats, KEPT)
    row = parts.sum_rows(payloads, rank_stride, ranks, kept, levels, BODY_BYTES, BITS, LOG_TILE)
    if CARRY:
        wanted = turned_back(row, center, decode_scale, HIDDEN, LOG_BLOCK, LOG_TILE, DOT)
        if KEPT:
            wanted = tl.where(is_apart, apart, wanted)
        if taken is not None:
            place = feature.to(tl.int64) * taken_column_stride
            wanted += parts.load_floats(taken + place, inside)
        wanted = tl.where(inside, wanted, 0.0)
        row = turned(wanted, center, scale, HIDDEN, LOG_BLOCK, LOG_TILE, DOT)
    else:
        row = tl.where(inside, row, 0.0)
    codes, size = parts.write_body(
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
            sum_levels,
            HIDDEN,
            LOG_BLOCK,
            KEPT,
            NATIVE,
            LOG_TILE,
            DOT,
        )
