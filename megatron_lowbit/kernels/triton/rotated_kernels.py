"""The kernels that `rotated` and `carrying` launch: one program a token, which finds its rows.

What it does with them is in `parts.rows` and `parts.reduce`.
"""

import triton
import triton.language as tl

from megatron_lowbit.kernels.triton.parts import reduce as reduce
from megatron_lowbit.kernels.triton.parts import rows as rows


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
    row_bytes,
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
):
    token = tl.program_id(0).to(tl.int64)  # offsets may pass 2**31
    partial += token * row_stride
    payload += token * row_bytes
    if taken is not None:
        taken += token * taken_row_stride
    if given is not None:
        given += token * given_row_stride
    rows.encode_row(
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
        HIDDEN,
        LOG_BLOCK,
        KEPT,
        BODY_BYTES,
        BITS,
        STEPS,
        CELLS,
        NATIVE,
        LOG_TILE,
        DOT,
    )


@triton.jit
def decode_sum(
    payloads,  # uint8 [ranks, tokens, row bytes]
    rank_stride,
    row_stride,
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
):
    token = tl.program_id(0).to(tl.int64)
    payloads += token * row_stride
    out += token * out_row_stride
    rows.decode_row(
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
        HIDDEN,
        LOG_BLOCK,
        KEPT,
        BODY_BYTES,
        BITS,
        NATIVE,
        LOG_TILE,
        DOT,
    )


@triton.jit
def reduce_encode(
    payloads,  # uint8 [ranks, tokens, row bytes]
    rank_stride,
    row_stride,
    ranks,
    taken,  # fp32, fp16 or the bits of BF16 [tokens, hidden], or None
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
    cells,  # int64 [CELLS]
    sum_levels,  # fp32 [2**SUM_BITS]; None to keep nothing
    payload,  # uint8 [tokens, row_bytes]
    row_bytes,
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
    token = tl.program_id(0).to(tl.int64)
    payloads += token * row_stride
    payload += token * row_bytes
    if taken is not None:
        taken += token * taken_row_stride
    if given is not None:
        given += token * given_row_stride
    reduce.reduce_row(
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
        HIDDEN,
        LOG_BLOCK,
        KEPT,
        BODY_BYTES,
        BITS,
        SUM_BODY_BYTES,
        SUM_BITS,
        STEPS,
        CELLS,
        NATIVE,
        LOG_TILE,
        DOT,
    )
