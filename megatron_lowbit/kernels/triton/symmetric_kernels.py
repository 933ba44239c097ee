"""The programs of `symmetric`: those of `rotated_kernels` with the sending between them.

A token belongs to one program on all ranks, so programs meet only those of their own number, and
each reads only what such programs wrote. A program reads a token's partial before it writes the
token's sum. They unpack tuples, which Triton does from 3.3 on (`select.FIRST_TRITON` is later).
"""

import triton
import triton.language as tl

from megatron_lowbit.kernels.triton import rotated_kernels as rotated
from megatron_lowbit.kernels.triton.parts import barrier as barrier
from megatron_lowbit.kernels.triton.parts import sending as sending


@triton.jit
def one_shot(
    partial,  # fp32, fp16 or the bits of BF16 [tokens, hidden or more]
    partial_row_stride,
    partial_column_stride,
    tokens,
    taken,  # fp32, fp16 or the bits of BF16 [tokens, hidden], or None
    taken_row_stride,
    taken_column_stride,
    given,  # the bits of BF16 [tokens, hidden], or None
    given_row_stride,
    given_column_stride,
    bounded,  # int64 [1], or None
    largest,
    center,  # fp32 [hidden], or None: this rank's
    encode_scale,  # fp32 [hidden], 0 for a BF16 feature
    encode_index,  # int64 [kept]: BF16 features of the partial
    kept,
    cells,  # int64 [CELLS]
    center_sum,  # fp32 [hidden], or None
    decode_scale,  # fp32 [hidden]
    index,  # int64 [kept]: BF16 features of the sum
    levels,  # fp32 [2**BITS]
    out,  # fp32, fp16 or the bits of BF16 [tokens, hidden]
    out_row_stride,
    out_column_stride,
    peers,  # int64 [ranks]
    calls,  # int32 [PROGRAMS]
    late,  # int32 [1]
    rank,
    ranks,
    half_bytes,
    polls,
    FLAG_BYTES: tl.constexpr,
    ROW: tl.constexpr,  # bytes from a row to the next
    WORDS: tl.constexpr,  # a power of two, at least ROW // 4
    PEERS: tl.constexpr,  # a power of two, at least `ranks`
    PROGRAMS: tl.constexpr,
    TRAP: tl.constexpr,  # whether a rank that does not come ends the kernel with an error
    HIDDEN: tl.constexpr,
    LOG_BLOCK: tl.constexpr,  # of encode: 0 for a partial that comes rotated
    LOG_SUM_BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    NATIVE: tl.constexpr,
    DOT: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    program = tl.program_id(0)
    call = tl.load(calls + program)
    half = FLAG_BYTES + tl.cast(call & 1, tl.int64) * half_bytes
    own = tl.load(peers + rank) + half
    for token in range(program, tokens, PROGRAMS):
        place = tl.cast(rank * tokens + token, tl.int64) * ROW
        rotated.encode(
            *(partial, partial_row_stride, partial_column_stride),
            *(taken, taken_row_stride, taken_column_stride),
            *(given, given_row_stride, given_column_stride, bounded, largest),
            *(center, encode_scale, decode_scale, encode_index, kept, cells, levels),
            *(sending.as_bytes(own + place), 0),
            *(HIDDEN, LOG_BLOCK, KEPT, BODY_BYTES, BITS, STEPS, CELLS, NATIVE, LOG_TILE, DOT),
            token=token,
        )
        sending.send_row(peers, rank, ranks, half + place, ROW, WORDS)
    barrier.meet(peers, rank, ranks, 2 * call + 2, polls, late, PEERS, TRAP, NATIVE)
    for token in range(program, tokens, PROGRAMS):
        received = sending.as_bytes(own + tl.cast(token, tl.int64) * ROW)
        rotated.decode_sum(
            *(received, tl.cast(tokens, tl.int64) * ROW, 0, ranks),
            *(center_sum, decode_scale, index, kept, levels),
            *(out, out_row_stride, out_column_stride),
            *(HIDDEN, LOG_SUM_BLOCK, KEPT, BODY_BYTES, BITS, NATIVE, LOG_TILE, DOT),
            token=token,
        )
    tl.store(calls + program, call + 1)


@triton.jit
def two_shot(
    partial,  # fp32, fp16 or the bits of BF16 [tokens, hidden or more]
    partial_row_stride,
    partial_column_stride,
    tokens,
    taken,  # fp32, fp16 or the bits of BF16 [tokens, hidden], or None
    taken_row_stride,
    taken_column_stride,
    given,  # the bits of BF16 [tokens, hidden], or None
    given_row_stride,
    given_column_stride,
    bounded,  # int64 [1], or None
    largest,
    sum_taken,  # as `taken`, of the sums that this rank owns: [share, hidden]
    sum_taken_row_stride,
    sum_taken_column_stride,
    sum_given,
    sum_given_row_stride,
    sum_given_column_stride,
    sum_bounded,
    sum_largest,
    chunk,  # tokens
    center,  # fp32 [hidden], or None: this rank's
    encode_scale,  # fp32 [hidden], 0 for a BF16 feature
    encode_index,  # int64 [kept]: BF16 features of the partial
    kept,
    cells,  # int64 [CELLS]
    levels,  # fp32 [2**BITS]
    sum_cells,  # int64 [SUM_CELLS]
    center_sum,  # fp32 [hidden], or None
    decode_scale,  # fp32 [hidden]
    index,  # int64 [kept]: BF16 features of the sum
    sum_levels,  # fp32 [2**SUM_BITS]
    out,  # fp32, fp16 or the bits of BF16 [tokens, hidden]
    out_row_stride,
    out_column_stride,
    peers,  # int64 [ranks]
    calls,  # int32 [PROGRAMS]
    late,  # int32 [1]
    rank,
    ranks,
    half_bytes,
    polls,
    FLAG_BYTES: tl.constexpr,
    ROW: tl.constexpr,
    SUM_ROW: tl.constexpr,
    WORDS: tl.constexpr,  # a power of two, at least SUM_ROW // 4
    PEERS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TRAP: tl.constexpr,
    HIDDEN: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    LOG_SUM_BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    SUM_BODY_BYTES: tl.constexpr,
    SUM_BITS: tl.constexpr,
    SUM_STEPS: tl.constexpr,
    SUM_CELLS: tl.constexpr,
    NATIVE: tl.constexpr,
    DOT: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    program = tl.program_id(0)
    call = tl.load(calls + program)
    half = FLAG_BYTES + tl.cast(call & 1, tl.int64) * half_bytes
    own = tl.load(peers + rank) + half
    share = tl.cdiv(tokens, ranks)
    for place in range(program, share, PROGRAMS):  # every owner's token at this place
        for step in range(ranks):
            owner = (rank + step) % ranks
            token = sending.token_of(place, owner, tokens, chunk, ranks)
            if token < tokens:
                theirs = tl.load(peers + owner) + half
                rotated.encode(
                    *(partial, partial_row_stride, partial_column_stride),
                    *(taken, taken_row_stride, taken_column_stride),
                    *(given, given_row_stride, given_column_stride, bounded, largest),
                    *(center, encode_scale, decode_scale, encode_index, kept, cells, levels),
                    *(sending.as_bytes(theirs + tl.cast(rank * share + place, tl.int64) * ROW), 0),
                    *(HIDDEN, LOG_BLOCK, KEPT, BODY_BYTES, BITS, STEPS, CELLS),
                    *(NATIVE, LOG_TILE, DOT),
                    token=token,
                )
    barrier.meet(peers, rank, ranks, 2 * call + 1, polls, late, PEERS, TRAP, NATIVE)
    sums = tl.cast(ranks * share, tl.int64) * ROW  # where they begin in a half
    for place in range(program, share, PROGRAMS):
        token = sending.token_of(place, rank, tokens, chunk, ranks)
        if token < tokens:
            received = sending.as_bytes(own + tl.cast(place, tl.int64) * ROW)
            row = sums + tl.cast(token, tl.int64) * SUM_ROW
            rotated.reduce_encode(
                *(received, tl.cast(share, tl.int64) * ROW, 0, ranks),
                *(sum_taken, sum_taken_row_stride, sum_taken_column_stride),
                *(sum_given, sum_given_row_stride, sum_given_column_stride),
                *(sum_bounded, sum_largest, center_sum, encode_scale, decode_scale),
                *(index, kept, levels, sum_cells, sum_levels),
                *(sending.as_bytes(own + row), 0),
                *(HIDDEN, LOG_SUM_BLOCK, KEPT, BODY_BYTES, BITS, SUM_BODY_BYTES, SUM_BITS),
                *(SUM_STEPS, SUM_CELLS, NATIVE, LOG_TILE, DOT),
                token=place,
            )
            sending.send_row(peers, rank, ranks, half + row, SUM_ROW, WORDS)
    barrier.meet(peers, rank, ranks, 2 * call + 2, polls, late, PEERS, TRAP, NATIVE)
    for place in range(program, share, PROGRAMS):
        for owner in range(ranks):
            token = sending.token_of(place, owner, tokens, chunk, ranks)
            if token < tokens:
                rotated.decode_sum(
                    *(sending.as_bytes(own + sums + tl.cast(token, tl.int64) * SUM_ROW), 0, 0, 1),
                    *(center_sum, decode_scale, index, kept, sum_levels),
                    *(out, out_row_stride, out_column_stride),
                    *(HIDDEN, LOG_SUM_BLOCK, KEPT, SUM_BODY_BYTES, SUM_BITS, NATIVE, LOG_TILE, DOT),
                    token=token,
                )
    tl.store(calls + program, call + 1)
