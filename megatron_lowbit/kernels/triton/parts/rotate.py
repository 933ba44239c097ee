"""The rotation inside the Triton kernels: butterflies, or products on the tensor cores.

Butterflies are the default, with the bits of `codecs.rotation`. One is a reshape, a split and a
join: which values change threads is the compiler's business. Products take four strides at once:
they multiply by a 16 x 16 Hadamard matrix, whose +1 and -1 are exact in BF16. Compiled by Triton
3.9 for sm_90, in a kernel that does nothing else, a row of 8192 in 8 warps takes:

    13 butterflies               28 instructions, 1.5 shuffles, 2.5 accesses of shared memory a
                                 value; 55 barriers
    3 products, one butterfly    39 instructions, 1.5 shuffles, 1.8 accesses a value; 11 barriers

Which is faster no GPU has said yet. A larger matrix would save products, but while an H200 moves
the bytes of a value's 4-bit encode its tensor cores do at most 500 operations: a product with
16 x 16 takes 96 of them, one with 64 x 64 would take 384.

An fp32 value goes in as three BF16 terms, cut and not rounded, which together are all of its bits;
the sums are fp32. So a row differs by 6e-8 of its norm, and less than 0.1 in 10,000 codes by a
step. Two terms (3e-6) would move 0.1 codes in 10,000 at 4 bits and up to 0.9 at 6, where a row's
scale rounds to another BF16, too; one would move 60 and 250. (Counted on a CPU, with fp32 matrix
products: rows of 64 to 8192 values, normal, heavy-tailed, and with one outlier.)

The bits depend on how a GPU adds inside a product, so all ranks must have the same kind:
`select.rotation_on` tells.
"""

import triton
import triton.language as tl


@triton.jit
def rotate(values, LOG_TILE: tl.constexpr, LOG_BLOCK: tl.constexpr, DOT: tl.constexpr):
    """The Hadamard transform, unnormalized, of each block of a row.

    Args:
        values: fp32 [1 << LOG_TILE].
        LOG_BLOCK: Of the values that are mixed; 0 for a row that is left as it is.
        DOT: What products take: "bf16", or "fp32" in the interpreter, which multiplies the bits of
            BF16 as integers; empty for butterflies, which a tile of less than 16 x 16 has anyway,
            and one of more than 1 << 14, whose products would spill registers.
    """
    FITS: tl.constexpr = LOG_TILE >= 8 and LOG_TILE <= 14
    PRODUCTS: tl.constexpr = LOG_BLOCK // 4 if DOT != "" and FITS else 0
    if PRODUCTS:
        matrix = _hadamard_matrix().to(tl.bfloat16 if DOT == "bf16" else tl.float32)
        for product in tl.static_range(PRODUCTS):
            values = _times(values, matrix, LOG_TILE, 4 * product, DOT)
    for step in tl.static_range(4 * PRODUCTS, LOG_BLOCK):
        pairs = tl.reshape(values, [1 << (LOG_TILE - step - 1), 2, 1 << step])
        first, second = tl.split(tl.permute(pairs, [0, 2, 1]))
        pairs = tl.permute(tl.join(first + second, first - second), [0, 2, 1])
        values = tl.reshape(pairs, [1 << LOG_TILE])
    return values


@triton.jit
def turned(
    row,
    center,
    scale,
    HIDDEN: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    LOG_TILE: tl.constexpr,
    DOT: tl.constexpr,
):
    """fp32 [1 << LOG_TILE]: features centred, scaled and rotated.

    Args:
        row: fp32 [1 << LOG_TILE], zero from HIDDEN on, as the result is.
        scale: 0 leaves a feature out.
    """
    feature = tl.arange(0, 1 << LOG_TILE)
    inside = feature < HIDDEN
    if center is not None:
        row -= tl.load(center + feature, mask=inside, other=0.0)
    factor = tl.load(scale + feature, mask=inside, other=0.0)
    return rotate(tl.where(factor == 0, 0.0, row * factor), LOG_TILE, LOG_BLOCK, DOT)


@triton.jit
def turned_back(
    row,
    center,
    scale,
    HIDDEN: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    LOG_TILE: tl.constexpr,
    DOT: tl.constexpr,
):
    """fp32 [1 << LOG_TILE]: a rotated row, the same, as features."""
    feature = tl.arange(0, 1 << LOG_TILE)
    inside = feature < HIDDEN
    row = rotate(row, LOG_TILE, LOG_BLOCK, DOT)
    row *= tl.load(scale + feature, mask=inside, other=0.0)
    if center is not None:
        row += tl.load(center + feature, mask=inside, other=0.0)
    return row


@triton.jit
def _hadamard_matrix():
    """int32 [16, 16] of +1 and -1: the parity of the bits that row and column share."""
    i = tl.arange(0, 16)
    shared = i[:, None] & i[None, :]
    shared ^= shared >> 2
    shared ^= shared >> 1
    return 1 - 2 * (shared & 1)


@triton.jit
def _times(values, matrix, LOG_TILE: tl.constexpr, STEP: tl.constexpr, DOT: tl.constexpr):
    """The butterflies of the four strides from 1 << STEP on, as a product with `matrix`."""
    rows = tl.reshape(values, [1 << (LOG_TILE - STEP - 4), 16, 1 << STEP])
    values = tl.reshape(tl.permute(rows, [0, 2, 1]), [1 << (LOG_TILE - 4), 16])
    rows = tl.dot(_term(values, DOT), matrix)
    values -= _cut(values)
    rows = tl.dot(_term(values, DOT), matrix, acc=rows)
    values -= _cut(values)  # the 8 bits that are left
    rows = tl.dot(_term(values, DOT), matrix, acc=rows)
    rows = tl.reshape(rows, [1 << (LOG_TILE - STEP - 4), 1 << STEP, 16])
    return tl.reshape(tl.permute(rows, [0, 2, 1]), [1 << LOG_TILE])


@triton.jit
def _cut(values):
    """fp32 `values` without what BF16 has no bits for."""
    return (values.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _term(values, DOT: tl.constexpr):
    """`_cut`, as `tl.dot` takes it here."""
    if DOT == "bf16":
        bits = values.to(tl.int32, bitcast=True) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return _cut(values)
