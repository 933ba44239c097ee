"""Error feedback in a program's row: what was to be sent and was not (`codecs.carry`).

The codes that were written are still in registers, and so is the row that was to be sent: what the
codes stand for is turned back as a receiver does it, and the error of the row, within its bound,
is rounded to BF16. So a carry costs its own bytes, one more rotation and two sums of squares. Two
rows at once are what registers hold: a row of more than 16,384 features, with 64 values a thread,
spills some.

A BF16 feature is told by its scale of 0: what was sent of it is what it is on the wire.
"""

import triton
import triton.language as tl

from megatron_lowbit.kernels.triton.parts import values as parts
from megatron_lowbit.kernels.triton.parts.rotate import turned_back


@triton.jit
def put_apart(values, scale, HIDDEN: tl.constexpr, LOG_TILE: tl.constexpr):
    """Put a token's BF16 features in their places.

    Args:
        values: fp32 [KEPT], in ascending order of the features.
        scale: fp32 [hidden], 0 for a BF16 feature.

    Returns:
        fp32 [1 << LOG_TILE], anything but at those features; and where they are.
    """
    feature = tl.arange(0, 1 << LOG_TILE)
    is_apart = tl.load(scale + feature, mask=feature < HIDDEN, other=1.0) == 0
    place = tl.maximum(tl.cumsum(is_apart.to(tl.int32), axis=0) - 1, 0)
    return tl.gather(values, place, axis=0), is_apart


@triton.jit
def give(
    wanted,
    codes,
    size,
    given,
    given_column_stride,
    bounded,
    largest,
    center,
    scale,
    levels,
    HIDDEN: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    NATIVE: tl.constexpr,
    LOG_TILE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Keep the error of a row that was written.

    Args:
        wanted: fp32 [1 << LOG_TILE], what was to be sent; zero from HIDDEN on.
        codes: int32 [1 << LOG_TILE], as written, and so
        size: fp32, the token's scale.
        given: The bits of BF16. It may be where the row came from.
        scale: What a receiver multiplies by, 0 for a BF16 feature.
    """
    feature = tl.arange(0, 1 << LOG_TILE)
    inside = feature < HIDDEN
    sent = tl.load(levels + codes) * size
    sent = turned_back(sent, center, scale, HIDDEN, LOG_BLOCK, LOG_TILE, DOT)
    if KEPT:
        is_apart = tl.load(scale + feature, mask=inside, other=1.0) == 0
        on_wire = (parts.wire_bits(wanted) << 16).to(tl.float32, bitcast=True)
        sent = tl.where(is_apart, on_wire, sent)
    error = tl.where(inside, wanted - sent, 0.0)
    most = largest * tl.sqrt_rn(parts.sum_of_squares(wanted, LOG_TILE))
    missed = tl.sqrt_rn(parts.sum_of_squares(error, LOG_TILE))
    is_large = missed > most
    error = tl.where(is_large, error * tl.div_rn(most, missed), error)
    tl.debug_barrier()  # all threads have read what this may overwrite
    parts.store_floats(given + feature.to(tl.int64) * given_column_stride, error, inside, NATIVE)
    if bounded is not None:
        tl.atomic_add(bounded, tl.cast(1, tl.int64), mask=is_large, sem="relaxed")
