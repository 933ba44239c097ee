"""Times of collectives on one group, and which collective they allow: pure functions.

Times are taken in *rounds* (`comm.policy.rounds`): a round calls native and every low-bit case,
one after the other, so what slows the machine for a while slows all of a round. A pass of a model
sums its sync points by one collective, whatever bits each of them has; so what is compared is a
pass: in each round the low-bit times, each as often as the model has such sync points, over as many
of native's.

Low bits are taken only where they surely save at least `MARGIN` of native's time: where the upper
end of the interval that holds the median of these ratios with 99.5 % is at most 1 - MARGIN. A dozen
decisions are made, by size and collective, and none is to be chance. (With 95 %, on 2 cores with 30
other processes, 2 of 10 decisions for low bits were slower than native.) No shape of the scatter is
assumed: the interval is that of order statistics. Of fewer than nine rounds the worst counts. An
interval of the unpaired times, the ratio of the two medians, was wider wherever it mattered.

Between two timed sizes the worse of both counts. Outside of them, what gets worse towards the end
goes on getting worse, and what gets better does not. A size that is alone says nothing of others.

All ranks have the same times and only add, multiply and compare them, so all choose alike.
"""

import bisect
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_lowbit.codecs import Codec, Tables
from megatron_lowbit.comm.traffic import Decision

BF16_BYTES = 2
# What low bits must save of native's time: they cost accuracy, and another day scatters otherwise.
MARGIN = 0.1
NATIVE, NATIVE_SCATTER = "native", "native reduce-scatter"
_OUTSIDE = 0.0025  # of the 99.5 % interval, at each end
_ENOUGH = 9  # rounds: fewer do not hold the interval, since 2**-8 is more than that


@dataclass(frozen=True)
class Kind:
    """Sync points of a pass that are alike.

    Attributes:
        codec: Theirs.
        tables: Of one of them.
        count: How many a pass has.
        carries: Whether they carry errors (`comm.feedback`).
    """

    codec: Codec
    tables: Tables
    count: int = 1
    carries: bool = False

    def case(self, collective: str) -> "Case":
        """What its times by `collective` are kept under."""
        return Case(repr(self.codec), self.carries, collective)


class Case(NamedTuple):
    """What was timed; natives have no codec and carry nothing."""

    codec: str
    carries: bool
    collective: str

    def __str__(self) -> str:
        return f"{self.codec}{' with carries' if self.carries else ''}"


Rounds = tuple[float, ...]
Bounds = list[tuple[int, float]]


@dataclass(frozen=True)
class Timings:
    """Milliseconds by case, bytes of the message in BF16, and round.

    Attributes:
        times: All cases have as many rounds at a size.
    """

    times: dict[Case, dict[int, Rounds]]

    def sizes(self, native: str = NATIVE) -> list[int]:
        """Bytes of the messages that were timed, ascending; empty if none was."""
        return sorted(self.times.get(Case("", False, native), {}))

    def missing(self, kinds: Sequence[Kind], collective: str) -> list[str]:
        """Which of `kinds` have no times of `collective`."""
        cases = (kind.case(collective) for kind in kinds)
        return [str(case) for case in cases if case not in self.times]

    def pass_times(self, kinds: Sequence[Kind], collective: str, size: int) -> Rounds:
        """Milliseconds of a whole pass, by round; empty if a kind was not timed."""
        if collective in (NATIVE, NATIVE_SCATTER):
            count = sum(kind.count for kind in kinds)
            own = self.times.get(Case("", False, collective), {}).get(size, ())
            return tuple(count * ms for ms in own)
        by_kind = [self.times.get(kind.case(collective), {}).get(size, ()) for kind in kinds]
        if not all(by_kind):
            return ()
        counts = [kind.count for kind in kinds]
        return tuple(
            sum(count * ms for count, ms in zip(counts, each, strict=True))
            for each in zip(*by_kind, strict=True)
        )

    def pass_ms(self, kinds: Sequence[Kind], collective: str, size: int) -> float:
        """Milliseconds of a pass of any size: medians, interpolated; NaN if not timed."""
        points = []
        for timed in self.sizes(native_of(collective)):
            if times := self.pass_times(kinds, collective, timed):
                points.append((timed, statistics.median(times)))
        return interpolate(points, size) if points else math.nan

    def ratios(self, kinds: Sequence[Kind], collective: str, size: int) -> list[float]:
        """What a pass takes of native's time, by round; empty if a kind was not timed."""
        low = self.pass_times(kinds, collective, size)
        rival = self.pass_times(kinds, native_of(collective), size)
        return [a / b for a, b in zip(low, rival, strict=True)] if low else []

    def bounds(self, kinds: Sequence[Kind], collective: str) -> Bounds:
        """By size, ascending: what a pass takes at the worst, of native's time."""
        by_size = (
            (size, self.ratios(kinds, collective, size))
            for size in self.sizes(native_of(collective))
        )
        return [(size, upper_end(ratios)) for size, ratios in by_size if ratios]

    def settled(self, kinds: Sequence[Kind], collectives: Sequence[str], size: int) -> bool:
        """Whether one collective is surely fast enough at a size, or none surely is."""
        by_collective = [self.ratios(kinds, name, size) for name in collectives]
        if any(len(ratios) < _ENOUGH for ratios in by_collective):
            return False
        one_is = any(upper_end(ratios) <= 1 - MARGIN for ratios in by_collective)
        return one_is or all(lower_end(ratios) > 1 - MARGIN for ratios in by_collective)


class ByTimes:
    """Decides by times.

    Args:
        timings: Of this group.
        kinds: The sync points of a pass, by kind.
        candidates: Low-bit collectives that are possible.
        source: What the times are from, in a few words.
        how: The same at length, for the line at the start.
    """

    def __init__(
        self,
        timings: Timings,
        kinds: Sequence[Kind],
        candidates: Sequence[str],
        *,
        source: str,
        how: str = "",
    ):
        self.timings, self.kinds, self.candidates = timings, kinds, candidates
        self.source, self.how = source, how or source

    def decide(self, native: str, size: int) -> Decision:
        """Native or a low-bit collective for messages of so many bytes of BF16."""
        worst = {name: worst_at(bounds, size) for name, bounds in self._bounds.items()}
        sure = [n for n, w in worst.items() if native_of(n) == native and w <= 1 - MARGIN]
        best = min(sure, key=worst.__getitem__, default=native)
        why = "native is kept" if best == native else "faster"
        return Decision(best, f"{why} by {self.source}")

    @cached_property
    def _bounds(self) -> dict[str, Bounds]:
        return {name: self.timings.bounds(self.kinds, name) for name in self.candidates}


def native_of(collective: str) -> str:
    """What a collective is measured against."""
    return NATIVE_SCATTER if "reduce-scatter" in collective else NATIVE


def upper_end(values: Sequence[float]) -> float:
    """The upper end of the 99.5 % interval of the median that these were drawn around.

    The largest of fewer than nine, which cannot hold it so surely.
    """
    ordered, count = sorted(values), len(values)
    above = 0
    # At place k (from 0): the chance that k + 1 or more of all are below the median.
    for k in range(count - 1, -1, -1):
        above += math.comb(count, k + 1)
        if above > _OUTSIDE * 2**count:
            return ordered[min(k + 1, count - 1)]
    return ordered[0]


def lower_end(values: Sequence[float]) -> float:
    """The lower end of the same interval; the smallest of fewer than nine."""
    return -upper_end([-value for value in values])


def worst_at(bounds: Bounds, size: int) -> float:
    """What is to be feared at any size, from the `bounds` of those that were timed."""
    sizes = [at for at, _ in bounds]
    place = bisect.bisect_left(sizes, size)
    if place < len(sizes) and sizes[place] == size:
        return bounds[place][1]
    if len(bounds) < 2:
        return math.inf
    if place == 0:
        return _beyond(bounds[1], bounds[0], size)
    if place == len(bounds):
        return _beyond(bounds[-2], bounds[-1], size)
    return max(bounds[place - 1][1], bounds[place][1])


def _beyond(inner: tuple[int, float], last: tuple[int, float], size: int) -> float:
    """Outside of the timed sizes: in steps of doublings, rounded up."""
    a_step = (last[1] - inner[1]) / _doublings(inner[0], last[0], up=False)
    return last[1] + max(a_step, 0.0) * _doublings(last[0], size, up=True)


def _doublings(a: int, b: int, *, up: bool) -> int:
    """How many lie between two sizes: whole ones (all computers agree on them), at least 1."""
    small, large = min(a, b), max(a, b)
    if up:
        return max((-(-large // small) - 1).bit_length(), 1)
    return max((large // small).bit_length() - 1, 1)


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


def size_text(count: int) -> str:
    """Bytes as in ``512 KB``."""
    for unit, name in ((1 << 20, "MB"), (1 << 10, "KB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} B"
