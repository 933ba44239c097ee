"""Pieces of Triton programs, each for one token's row.

What an argument says nothing else of is here; tables are those of `megatron_lowbit.kernels`.

    partial, taken, given, out
                    fp32, fp16 or the bits of BF16, each with its column stride; None: nothing
    payload         the bytes of the token's row; of payloads: of rank 0, `rank_stride` bytes to the
                    next of `ranks`
    kept            BF16 features; KEPT: a power of two, at least that, or 0
    cells           int64 [CELLS] and STEPS (`kernels.cells`)
    HIDDEN          features of the body's row; LOG_TILE: of the tile that holds it
    LOG_BLOCK       of the values that the rotation mixes, 0 for a row that comes rotated
    BODY_BYTES      of the packed codes; BITS: of a code
    NATIVE          see `values.store_floats`; DOT: see `rotate.rotate`
"""
