"""The programs behind `grouped`: each has one token's row, a tile of ``[groups, features]``.

So a group's numbers are made once and spread over its features. Numbers are read and written by
bytes, since a row begins anywhere. What differs between formats is in `parts.group_formats`; one
more, ``bf16``, has no groups: each feature is a number.
"""

import triton
import triton.language as tl

from megatron_lowbit.kernels.triton.parts import group_formats as formats
from megatron_lowbit.kernels.triton.parts import spikes as spikes
from megatron_lowbit.kernels.triton.parts import values as parts


@triton.jit
def encode(
    partial,  # fp32, fp16 or the bits of BF16 [tokens, HIDDEN]
    row_stride,
    column_stride,
    payload,  # uint8 [tokens, row_bytes]
    row_bytes,
    HIDDEN: tl.constexpr,
    GROUP: tl.constexpr,  # features, a power of two; the whole tile for one group a token
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BODY_BYTES: tl.constexpr,  # of the packed codes, aligned for the numbers behind
    SCALE_BYTES: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # offsets may pass 2**31
    partial += token * row_stride
    payload += token * row_bytes
    group, place = _places(GROUP, LOG_TILE)
    inside = place < HIDDEN
    values = parts.load_floats(partial + place * column_stride, inside)
    if FORMAT == "bf16":
        parts.store_bytes(payload + 2 * place, parts.wire_bits(values), inside, 2)
    else:
        numbers = payload + BODY_BYTES
        groups: tl.constexpr = (HIDDEN + GROUP - 1) // GROUP
        real = group < groups
        affine: tl.constexpr = FORMAT == "affine" or FORMAT == "spikes"
        if affine and HIDDEN % GROUP:  # zeros are no extremes: the last group goes on as it ended
            last = tl.sum(tl.sum(tl.where(place == HIDDEN - 1, values, 0.0), axis=1), axis=0)
            values = tl.where(inside, values, last)
        if FORMAT == "nvfp4":
            values = _divide_by_token(values, numbers)
            numbers += 4
        if FORMAT == "absmax-rotated":
            values = _butterflies(values, 0.5, HIDDEN, GROUP, LOG_TILE)
        if FORMAT == "spikes":
            values = spikes.write(values, numbers + 4 * groups, group, groups)
        low, high = formats.extremes(values, FORMAT)
        bits = formats.encode_scale(low, high, FORMAT, BITS)
        parts.store_bytes(numbers + SCALE_BYTES * group, bits, real, SCALE_BYTES)
        if affine:
            zero = parts.bf16_bits(low)
            parts.store_bytes(numbers + 2 * (groups + group), zero, real, 2)
            values -= (zero << 16).to(tl.float32, bitcast=True)[:, None]
        step = formats.decode_scale(bits, FORMAT, BITS)
        usable = (tl.abs(step) < float("inf")) & (step != 0)
        steps = tl.div_rn(values, tl.where(usable, step, 1.0)[:, None])
        codes = formats.to_codes(tl.where(usable[:, None], steps, 0.0), FORMAT, BITS)
        codes = tl.reshape(tl.where(inside, codes, 0), [1 << LOG_TILE])
        parts.pack_bytes(codes, payload, BODY_BYTES, BITS, LOG_TILE)


@triton.jit
def _divide_by_token(values, number):
    """Write the fp32 scale of a token, of its finite groups, and divide its values by it."""
    size = formats.absmax(*formats.extremes(values, "nvfp4"))
    size = tl.max(tl.where(size == size, size, 0.0), axis=0)
    scale = tl.div_rn(size, 2688.0)  # the largest of E2M1, 6, times that of E4M3, 448
    parts.store_bytes(number, scale.to(tl.int32, bitcast=True), None, 4)
    return tl.div_rn(values, tl.where(scale == 0, 1.0, scale))


@triton.jit
def _butterflies(values, factor, HIDDEN: tl.constexpr, GROUP: tl.constexpr, LOG_TILE: tl.constexpr):
    """fp32 [groups, GROUP] in blocks of 32, or less at the end: `codecs.peers.sdp4bit`."""
    values = tl.reshape(values, [1 << LOG_TILE])
    place = tl.arange(0, 1 << LOG_TILE)
    for step in tl.static_range(5):
        pairs = tl.reshape(values * factor, [1 << (LOG_TILE - step - 1), 2, 1 << step])
        first, second = tl.split(tl.permute(pairs, [0, 2, 1]))
        pairs = tl.permute(tl.join(first + second, first - second), [0, 2, 1])
        whole = place < HIDDEN - HIDDEN % (2 << step)
        values = tl.where(whole, tl.reshape(pairs, [1 << LOG_TILE]), values)
    return tl.reshape(values, [(1 << LOG_TILE) // GROUP, GROUP])


@triton.jit
def _places(GROUP: tl.constexpr, LOG_TILE: tl.constexpr):
    """Number of each group, int32 [groups], and of each feature, int64 [groups, GROUP]."""
    group = tl.arange(0, (1 << LOG_TILE) // GROUP)
    return group, group[:, None].to(tl.int64) * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def decode_sum(
    payloads,  # uint8 [ranks, tokens, row bytes]
    rank_stride,
    row_stride,
    ranks,
    out,  # fp32, fp16 or the bits of BF16 [tokens, HIDDEN]
    out_row_stride,
    out_column_stride,
    HIDDEN: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BODY_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    NATIVE: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    payloads += token * row_stride
    out += token * out_row_stride
    total = _values(payloads, HIDDEN, GROUP, FORMAT, BITS, BODY_BYTES, SCALE_BYTES, LOG_TILE)
    for _ in range(1, ranks):
        payloads += rank_stride
        total += _values(payloads, HIDDEN, GROUP, FORMAT, BITS, BODY_BYTES, SCALE_BYTES, LOG_TILE)
    if FORMAT == "absmax-rotated":
        total = _butterflies(total, 1.0, HIDDEN, GROUP, LOG_TILE)
    _, place = _places(GROUP, LOG_TILE)
    parts.store_floats(out + place * out_column_stride, total, place < HIDDEN, NATIVE)


@triton.jit
def _values(
    payload,
    HIDDEN: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    BODY_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    """fp32 [groups, GROUP]: a rank's row; behind the last feature anything."""
    group, place = _places(GROUP, LOG_TILE)
    if FORMAT == "bf16":
        values = parts.load_bf16(payload + 2 * place, place < HIDDEN)
    else:
        codes = parts.unpack(payload, BODY_BYTES, BITS, LOG_TILE)
        steps = formats.from_codes(codes, FORMAT, BITS)
        values = tl.reshape(steps, [(1 << LOG_TILE) // GROUP, GROUP])
        numbers = payload + BODY_BYTES
        groups: tl.constexpr = (HIDDEN + GROUP - 1) // GROUP
        real = group < groups
        of_token = 1.0
        if FORMAT == "nvfp4":
            of_token = parts.load_bytes(numbers, None, 4).to(tl.float32, bitcast=True)
            numbers += 4
        bits = parts.load_bytes(numbers + SCALE_BYTES * group, real, SCALE_BYTES)
        values *= formats.decode_scale(bits, FORMAT, BITS)[:, None]
        if FORMAT == "nvfp4":
            values *= of_token
        if FORMAT == "affine" or FORMAT == "spikes":
            values += parts.load_bf16(numbers + 2 * (groups + group), real)[:, None]
        if FORMAT == "spikes":
            values = spikes.put_back(values, numbers + 4 * groups, group, groups)
    return values
