"""What is surely true of times that scatter, and of sizes between those that were timed.

An interval of ratios is Wilcoxon's. It assumes that their logarithms scatter alike to both sides.
A stall of a second is one round of many, whatever it took. Of fewer than nine rounds the worst
counts. The interval of the median assumes nothing, and needs more rounds than there is time for at
load. (3 ranks on 2 cores of an EPYC, loopback, 1 to 64 tokens of 576 features, 0.6 s each: by the
median one-shot, which takes half of native's time, was sure in 27 to 69 of 100 tries, and by
Wilcoxon's in 73 to 83.)

Between two timed sizes the worse of both counts. Outside of them, what gets worse towards the end
goes on getting worse, and what gets better does not. Longer messages take what each byte more took
last, so that a codec that is slower than the link is seen. (4 ranks on 2 cores of an EPYC,
loopback, one-shot of native: 0.5 at 128 KB, 0.65 at 512 KB, 1.3 at 2 MB, 2.2 at 8 MB.) A size that
is alone says nothing of others.
"""

import bisect
import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, takewhile
from typing import NamedTuple

import torch

_OUTSIDE = 0.0025  # of the 99.5 % interval, at each end
ENOUGH = 9  # rounds: fewer do not hold the interval, since 2**-8 is more than that


class Bound(NamedTuple):
    """What is known of one timed size.

    Attributes:
        size: Bytes of the message in BF16.
        best: What low bits take at best, of native's time.
        middle: What they take in the middle.
        worst: What they take at the worst.
        low_ms: A pass in low bits, the median.
        native_ms: A native one.
    """

    size: int
    best: float
    middle: float
    worst: float
    low_ms: float
    native_ms: float


Bounds = Sequence[Bound]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The 99.5 % interval of what ratios were drawn around: lower end, middle, upper end.

    Wilcoxon's: the geometric means of all pairs (each value with itself, too) in order, without the
    `_outside` outermost at each end, and their median. Of fewer than nine values, which cannot hold
    it so surely, the ends are the smallest and the largest.
    """
    given = torch.tensor(values, dtype=torch.float64, device="cpu")
    first, second = torch.triu_indices(len(given), len(given), device="cpu")
    squares, outside = given[first] * given[second], _outside(len(given))
    places = (1 + outside, len(squares) // 2 + 1, len(squares) - outside)
    lower, middle, upper = (math.sqrt(squares.kthvalue(place).values) for place in places)
    return lower, middle, upper


@cache
def _outside(count: int) -> int:
    """How many means of pairs are left out at each end."""
    ways = [1]  # of drawing signs, by the sum of the places of the negative ones
    for place in range(1, count + 1):
        gap = [0] * place
        ways = [without + with_it for without, with_it in zip(ways + gap, gap + ways, strict=True)]
    chances = accumulate(ways)
    within = takewhile(lambda chance: chance <= _OUTSIDE * 2**count, chances)
    return max(len(list(within)) - 1, 0)


def ratio_at(bounds: Bounds, size: int) -> tuple[float, float]:
    """The worst and the middle at any size, from the `bounds` of those that were timed."""
    size = max(size, 1)  # an empty message
    if bounds and bounds[0].size <= size <= bounds[-1].size:
        near = _next_to(bounds, size)
        return max(bound.worst for bound in near), max(bound.middle for bound in near)
    if len(bounds) < 2:
        return math.inf, math.inf
    if size < bounds[0].size:
        return _shorter(bounds[1], bounds[0], size)
    return _longer(bounds[-2], bounds[-1], size)


def near(bounds: Bounds, size: int) -> Bounds:
    """That of `size` itself, those of the timed sizes on both sides, or that of the nearest."""
    if not bounds:
        return []
    return _next_to(bounds, min(max(size, bounds[0].size), bounds[-1].size))


def _next_to(bounds: Bounds, size: int) -> Bounds:
    """That of `size` itself, or of the timed sizes on both sides of it."""
    place = bisect.bisect_left(bounds, size, key=lambda bound: bound.size)
    return bounds[place if bounds[place].size == size else place - 1 : place + 1]


def _longer(inner: Bound, last: Bound, size: int) -> tuple[float, float]:
    """Beyond the longest: by what each byte more took between the two longest."""
    bytes_more = (size - last.size) / (last.size - inner.size)
    low = last.low_ms + max(last.low_ms - inner.low_ms, 0.0) * bytes_more
    native = last.native_ms + max(last.native_ms - inner.native_ms, 0.0) * bytes_more
    factor = max(low / native * last.native_ms / last.low_ms, 1.0)
    return last.worst * factor, last.middle * factor


def _shorter(inner: Bound, last: Bound, size: int) -> tuple[float, float]:
    """Below the shortest: by what each halving added, in whole steps (all computers agree)."""
    timed = max((inner.size // last.size).bit_length() - 1, 1)
    beyond = max((-(-last.size // size) - 1).bit_length(), 1)
    worst = last.worst + max(last.worst - inner.worst, 0.0) / timed * beyond
    return worst, last.middle + max(last.middle - inner.middle, 0.0) / timed * beyond


def interpolate(points: Sequence[tuple[int, float]], size: int) -> float:
    """The time at `size`, from ``(size, time)`` in ascending order.

    Between two sizes on logarithmic scales; below the smallest it is the smallest's, and above the
    largest it grows with the size.
    """
    sizes = [point[0] for point in points]
    if size <= sizes[0]:
        return points[0][1]
    if size >= sizes[-1]:
        return points[-1][1] * size / sizes[-1]
    above = bisect.bisect_left(sizes, size)
    (x0, y0), (x1, y1) = points[above - 1], points[above]
    share = math.log(size / x0) / math.log(x1 / x0)
    return math.exp(math.log(y0) + share * math.log(y1 / y0))
