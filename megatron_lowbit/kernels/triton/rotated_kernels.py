"""The kernels that `rotated` launches: one program a token, which finds its rows.

What it does with them is in `parts.rows`.
"""

import triton
import triton.language as tl

from megatron_lowbit.kernels.triton.parts import rows as rows


@triton.jit
def encode(
    partial,  # fp32, fp16 or the bits of BF16 [tokens, hidden or more]
    row_stride,
    column_stride,
    center,  # fp32 [hidden], or None
    scale,  # fp32 [hidden], 0 for a BF16 feature
    index,  # int64 [kept]
    kept,
    cells,  # int64 [CELLS]
    payload,  # uint8 [tokens, row_bytes]
    row_bytes,
    HIDDEN: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    KEPT: tl.constexpr,  # a power of two, at least `kept`; or 0
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    LOG_TILE: tl.constexpr,
    DOT: tl.constexpr,  # as for `parts.rotate.rotate`
):
    token = tl.program_id(0).to(tl.int64)  # offsets may pass 2**31
    partial += token * row_stride
    payload += token * row_bytes
    rows.encode_row(
        partial,
        column_stride,
        center,
        scale,
        index,
        kept,
        cells,
        payload,
        HIDDEN,
        LOG_BLOCK,
        KEPT,
        BODY_BYTES,
        BITS,
        STEPS,
        CELLS,
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
    kept,
    levels,  # fp32 [2**BITS]
    cells,  # int64 [CELLS]
    payload,  # uint8 [tokens, row_bytes]
    row_bytes,
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
    token = tl.program_id(0).to(tl.int64)
    payloads += token * row_stride
    payload += token * row_bytes
    rows.reduce_row(
        payloads,
        rank_stride,
        ranks,
        kept,
        levels,
        cells,
        payload,
        HIDDEN,
        KEPT,
        BODY_BYTES,
        BITS,
        SUM_BODY_BYTES,
        SUM_BITS,
        STEPS,
        CELLS,
        LOG_TILE,
    )
