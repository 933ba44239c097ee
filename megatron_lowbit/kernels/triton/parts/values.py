"""What the Triton kernels are made of: each a piece of a program that has one token's row.

A row is a tile of 1 << LOG_TILE values in registers: the features in order, then zeros up to the
next power of two. The bits are those of plain torch: fp32, the same operands in every addition,
division and square root correctly rounded, and nothing fused (`launching.launch` sees to that).

BF16 tensors come as int16, since Triton's interpreter converts BF16 wrongly: it truncates, and it
loses subnormal numbers.
"""

import triton
import triton.language as tl


@triton.jit
def load_floats(pointers, mask):
    """fp32 of what lies at `pointers`, fp32, fp16 or the bits of BF16; 0 where masked out."""
    values = tl.load(pointers, mask=mask, other=0)
    if values.dtype == tl.int16:
        return (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return values.to(tl.float32)


@triton.jit
def load_wanted(partial, column_stride, taken, taken_column_stride, place, mask):
    """fp32 of a token's features at `place`: the partial and what is taken; 0 where masked out."""
    place = place.to(tl.int64)
    values = load_floats(partial + place * column_stride, mask)
    if taken is not None:
        values += load_floats(taken + place * taken_column_stride, mask)
    return values


@triton.jit
def store_floats(pointers, values, mask, NATIVE: tl.constexpr):
    """fp32 `values`, rounded to the type at `pointers` (int16: the bits of BF16).

    NATIVE: round by the GPU's own instruction, which the interpreter lacks; the same but for the
    bits of a NaN.
    """
    if pointers.dtype.element_ty == tl.int16:
        if NATIVE:
            bits = values.to(tl.bfloat16).to(tl.int16, bitcast=True)
        else:
            bits = bf16_bits(values).to(tl.int16)
        tl.store(pointers, bits, mask=mask)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def bf16_bits(values):
    """int32 in [0, 65536): fp32 to the nearest BF16, ties to even; every NaN is 0xffff."""
    bits = values.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(values == values, rounded, -1) & 0xFFFF


@triton.jit
def wire_bits(values):
    """`bf16_bits` as on the wire: finite values saturate, an infinity is NaN."""
    largest: tl.constexpr = 3.3895313892515355e38  # BF16
    size = tl.abs(values)
    limited = tl.where(size > largest, tl.where(values > 0, largest, -largest), values)
    return tl.where(size == float("inf"), 0xFFFF, bf16_bits(limited))


@triton.jit
def round_within(values, LEAST: tl.constexpr, MOST: tl.constexpr):
    """int32: to the nearest, ties to even, within LEAST and MOST; of NaN anything."""
    values = tl.minimum(tl.maximum(values, LEAST + 0.0), MOST + 0.0)
    shift: tl.constexpr = 12582912.0  # 1.5 * 2**23: fp32 has no fractions here
    return ((values + shift) - shift).to(tl.int32)


@triton.jit
def load_bytes(pointers, mask, BYTES: tl.constexpr):
    """int32 of so many bytes at byte `pointers`, aligned or not."""
    bits = tl.load(pointers, mask=mask).to(tl.int32)
    for byte in tl.static_range(1, BYTES):
        bits |= tl.load(pointers + byte, mask=mask).to(tl.int32) << (8 * byte)
    return bits


@triton.jit
def store_bytes(pointers, bits, mask, BYTES: tl.constexpr):
    """The lowest bytes of int32 `bits` at byte `pointers`, aligned or not."""
    for byte in tl.static_range(BYTES):
        tl.store(pointers + byte, ((bits >> (8 * byte)) & 255).to(tl.uint8), mask=mask)


@triton.jit
def load_bf16(pointers, mask):
    """fp32 of BF16 values at byte `pointers`, aligned or not."""
    return (load_bytes(pointers, mask, 2) << 16).to(tl.float32, bitcast=True)


@triton.jit
def sum_of_squares(values, LOG_TILE: tl.constexpr):
    """By the pairwise tree: the upper half is added to the lower one until one value is left."""
    values = values * values
    for step in tl.static_range(LOG_TILE):
        values = tl.sum(tl.reshape(values, [2, 1 << (LOG_TILE - step - 1)]), axis=0)
    return tl.sum(values, axis=0)


@triton.jit
def root_mean_square(values, COUNT: tl.constexpr, LOG_TILE: tl.constexpr):
    """Of fp32 [1 << LOG_TILE], zero from COUNT on; of no values it is 0."""
    count: tl.constexpr = COUNT if COUNT else 1
    return tl.sqrt_rn(tl.div_rn(sum_of_squares(values, LOG_TILE), count + 0.0))


@triton.jit
def write_body(
    row,
    finite,
    payload,
    kept,
    cells,
    HIDDEN: tl.constexpr,
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    """Write scale and codes of a rotated row.

    Args:
        row: fp32 [1 << LOG_TILE], zero from HIDDEN on.
        finite: 0 if a BF16 feature of the token is not finite, else 1.
        kept: BF16 features, which lie between codes and scale.
        cells: As for `quantize`.

    Returns:
        The codes, int32 [1 << LOG_TILE], and the scale as its receivers read it.
    """
    scale = root_mean_square(row, HIDDEN, LOG_TILE)
    scale = tl.where((finite != 0) & (scale < float("inf")), scale, float("nan"))
    bits = bf16_bits(scale)
    store_bytes(payload + BODY_BYTES + BODY_BYTES % 2 + 2 * kept, bits, None, 2)
    scale = (bits << 16).to(tl.float32, bitcast=True)
    inverse = tl.where(scale == 0, 0.0, tl.div_rn(1.0, scale))
    codes = quantize(row * inverse, cells, STEPS, CELLS)
    codes = tl.where(tl.arange(0, 1 << LOG_TILE) < HIDDEN, codes, 0)
    pack(codes, payload, BODY_BYTES, BITS, LOG_TILE)
    return codes, scale


@triton.jit
def sum_rows(
    payloads,
    rank_stride,
    ranks,
    kept,
    levels,
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    """fp32 [1 << LOG_TILE]: the levels of a token times its scale, summed in rank order.

    Behind the last feature there is anything.

    Args:
        kept: BF16 features, which lie between codes and scale.
    """
    total = row_values(payloads, kept, levels, BODY_BYTES, BITS, LOG_TILE)
    for _ in range(1, ranks):
        payloads += rank_stride
        total += row_values(payloads, kept, levels, BODY_BYTES, BITS, LOG_TILE)
    return total


@triton.jit
def row_values(
    payload, kept, levels, BODY_BYTES: tl.constexpr, BITS: tl.constexpr, LOG_TILE: tl.constexpr
):
    """fp32 [1 << LOG_TILE]: the levels of one rank's row times its scale; as for `sum_rows`."""
    codes = unpack(payload, BODY_BYTES, BITS, LOG_TILE)
    place = BODY_BYTES + BODY_BYTES % 2 + 2 * kept
    return tl.load(levels + codes) * load_bf16(payload + place, None)


@triton.jit
def index_of(index, kept, KEPT: tl.constexpr):
    """int64 [KEPT]: the BF16 features, of int64 [kept]; 0 behind the last one, and which are real.

    KEPT is a power of two, at least `kept`.
    """
    j = tl.arange(0, KEPT)
    mask = j < kept
    return tl.load(index + j, mask=mask, other=0), mask


@triton.jit
def write_kept(values, kept, floats, KEPT: tl.constexpr):
    """Write a token's BF16 features; gives 1 if all of them are finite, else 0.

    Args:
        values: fp32 [KEPT].
        kept: How many are real.
        floats: The bytes of the row where the BF16 values begin.
    """
    j = tl.arange(0, KEPT)
    mask = j < kept
    bits = wire_bits(values)
    store_bytes(floats + 2 * j, bits, mask, 2)
    return tl.min(tl.where(mask & ((bits & 0x7F80) == 0x7F80), 0, 1), axis=0)


@triton.jit
def sum_kept(floats, rank_stride, ranks, kept, KEPT: tl.constexpr):
    """fp32 [KEPT]: a token's BF16 features, summed in rank order."""
    j = tl.arange(0, KEPT)
    mask = j < kept
    total = load_bf16(floats + 2 * j, mask)
    for _ in range(1, ranks):
        floats += rank_stride
        total += load_bf16(floats + 2 * j, mask)
    return total


@triton.jit
def pack(codes, body, BODY_BYTES: tl.constexpr, BITS: tl.constexpr, LOG_TILE: tl.constexpr):
    """`pack_bytes`, and a zero behind an odd number of them."""
    pack_bytes(codes, body, BODY_BYTES, BITS, LOG_TILE)
    if BODY_BYTES % 2:
        tl.store(body + BODY_BYTES, tl.zeros([], tl.uint8))


@triton.jit
def pack_bytes(codes, body, BODY_BYTES: tl.constexpr, BITS: tl.constexpr, LOG_TILE: tl.constexpr):
    """Write codes, int32 [1 << LOG_TILE], zero behind the last one, to the bytes at `body`."""
    GROUP: tl.constexpr = 8 // (BITS & -BITS)  # codes that fill whole bytes
    words = tl.reshape(codes, [(1 << LOG_TILE) // GROUP, GROUP])
    if GROUP * BITS > 32:
        words = words.to(tl.int64)
    words = tl.sum(words << (BITS * tl.arange(0, GROUP))[None, :], axis=1)
    byte, place, mask = _places(BODY_BYTES, BITS, LOG_TILE)
    tl.store(body + place, ((words[:, None] >> (8 * byte)) & 255).to(tl.uint8), mask=mask)


@triton.jit
def unpack(body, BODY_BYTES: tl.constexpr, BITS: tl.constexpr, LOG_TILE: tl.constexpr):
    """int32 [1 << LOG_TILE]: the codes in the bytes at `body`, zero behind the last one."""
    GROUP: tl.constexpr = 8 // (BITS & -BITS)
    byte, place, mask = _places(BODY_BYTES, BITS, LOG_TILE)
    words = tl.load(body + place, mask=mask, other=0).to(tl.int32)
    if GROUP * BITS > 32:
        words = words.to(tl.int64)
    words = tl.sum(words << (8 * byte), axis=1)[:, None]
    codes = (words >> (BITS * tl.arange(0, GROUP))[None, :]) & ((1 << BITS) - 1)
    return tl.reshape(codes.to(tl.int32), [1 << LOG_TILE])


@triton.jit
def _places(BODY_BYTES: tl.constexpr, BITS: tl.constexpr, LOG_TILE: tl.constexpr):
    """Of the bytes of each group of codes: number in the group, place in the row, whether real."""
    BYTES: tl.constexpr = BITS // (BITS & -BITS)
    WIDTH: tl.constexpr = 1 if BYTES == 1 else (4 if BYTES == 3 else 8)
    byte = tl.arange(0, WIDTH)[None, :]
    group = tl.arange(0, (1 << LOG_TILE) * (BITS & -BITS) // 8)
    place = BYTES * group[:, None] + byte
    return byte, place, (byte < BYTES) & (place < BODY_BYTES)


@triton.jit
def quantize(values, cells, STEPS: tl.constexpr, CELLS: tl.constexpr):
    """int32 codes of fp32 values; NaN gives 0. `cells.cells` makes the table."""
    place = tl.minimum(tl.maximum(values * STEPS + CELLS // 2, 0.0), CELLS - 1.0)
    entry = tl.load(cells + place.to(tl.int32))
    threshold = entry.to(tl.int32).to(tl.float32, bitcast=True)
    return (entry >> 32).to(tl.int32) + (values > threshold).to(tl.int32)
