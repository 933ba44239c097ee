"""The programs of ``rotated-hybrid`` and ``shaped-hybrid``: what one does with a token's rows.

`rotated` and `carrying` launch each of them alone, one program a token; `symmetric_kernels` calls
them with the sending between them, and gives each the token.

A sum that is sent on without error feedback is written as it is, rotated. With it the sum is turned
back first, since what is carried is features: the next sync point has other tables. What is kept of
a row is in `parts.carries`.
"""

import triton
import triton.language as tl

from megatron_lowbit.kernels.triton.parts import carries as carries
from megatron_lowbit.kernels.triton.parts import values as parts
from megatron_lowbit.kernels.triton.parts.rotate import turned, turned_back


@triton.jit
def encode(
    partial,  # fp32, fp16 or the bits of BF16 [tokens, hidden or more]
    row_stride,
    column_stride,
    taken,  # fp32, fp16 or the bits of BF16 [tokens, hidden], or None
    taken_row_stride,
    taken_column_stride,
    given,  # the bits of BF16 [tokens, hidden], or None
    given_row_stride,
    given_column_stride,
    bounded,  # int64 [1], or None
    largest,
    center,  # fp32 [hidden], or None
    scale,  # fp32 [hidden], 0 for a BF16 feature
    decode_scale,  # fp32 [hidden]; None to keep nothing
    index,  # int64 [kept]
    kept,
    cells,  # int64 [CELLS]
    levels,  # fp32 [2**BITS]; None to keep nothing
    payload,  # uint8 [tokens, row_bytes]
    row_bytes,  # 0 for a payload that is the token's row
    HIDDEN: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    KEPT: tl.constexpr,  # a power of two, at least `kept`; or 0
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    NATIVE: tl.constexpr,
    LOG_TILE: tl.constexpr,
    DOT: tl.constexpr,  # as for `parts.rotate.rotate`
    token,  # None: the number of the program
):
    """Write a token's partial, and what is taken, into its row; keep what is missed."""
    token = tl.cast(tl.program_id(0) if token is None else token, tl.int64)  # may pass 2**31
    partial += token * row_stride
    payload += token * row_bytes
    if taken is not None:
        taken += token * taken_row_stride
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
            given + token * given_row_stride,
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
def decode_sum(
    payloads,  # uint8 [ranks, tokens, row bytes]
    rank_stride,
    row_stride,  # 0 for payloads that are the token's rows
    ranks,
    center,  # fp32 [hidden], or None
    scale,  # fp32 [hidden]
    index,  # int64 [kept]
    kept,
    levels,  # fp32 [2**BITS]
    out,  # fp32, fp16 or the bits of BF16 [tokens, hidden]
    out_row_stride,
    out_column_stride,
    HIDDEN: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    NATIVE: tl.constexpr,
    LOG_TILE: tl.constexpr,
    DOT: tl.constexpr,  # as for `parts.rotate.rotate`
    token,  # None: the number of the program
):
    """Sum a token's rows of all ranks and turn the sum back."""
    token = tl.cast(tl.program_id(0) if token is None else token, tl.int64)
    payloads += token * row_stride
    out += token * out_row_stride
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


@triton.jit
def reduce_encode(
    payloads,  # uint8 [ranks, tokens, row bytes]
    rank_stride,
    row_stride,  # 0 for payloads that are the token's rows
    ranks,
    taken,  # of the sum: fp32, fp16 or the bits of BF16 [tokens, hidden], or None
    taken_row_stride,
    taken_column_stride,
    given,  # the bits of BF16 [tokens, hidden], or None
    given_row_stride,
    given_column_stride,
    bounded,  # int64 [1], or None
    largest,
    center,  # fp32 [hidden]: of the sum, or None
    scale,  # fp32 [hidden], 0 for a BF16 feature; None without a carry, as the next two
    decode_scale,  # fp32 [hidden]
    index,  # int64 [kept]
    kept,
    levels,  # fp32 [2**BITS]
    cells,  # int64 [CELLS]: of the new row, as what follows
    sum_levels,  # fp32 [2**SUM_BITS]; None to keep nothing
    payload,  # uint8 [tokens, row_bytes]
    row_bytes,  # 0 for a payload that is the token's row
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
    token,  # None: the number of the program
):
    """Sum a token's rows of all ranks and write the sum into a row; keep what is missed."""
    token = tl.cast(tl.program_id(0) if token is None else token, tl.int64)
    payloads += token * row_stride
    payload += token * row_bytes
    CARRY: tl.constexpr = taken is not None or given is not None
    if taken is not None:
        taken += token * taken_row_stride
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
        row, finite, payload, kept, cells, HIDDEN, SUM_BODY_BYTES, SUM_BITS, STEPS, CELLS, LOG_TILE
    )
    if given is not None:
        carries.give(
            wanted,
            codes,
            size,
            given + token * given_row_stride,
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
