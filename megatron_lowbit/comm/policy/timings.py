"""Times of collectives on one group, and which collective they allow: pure functions.

Times are taken in *rounds* (`comm.policy.rounds`): a round calls native and low bits one after the
other, so what slows the machine for a while slows all of a round. A pass of a model sums its sync
points by one collective, whatever bits each of them has; so what is compared is a pass: in each
round the low-bit times, each as often as the model has such sync points, over as many of native's.

A pass waits for the mean of its calls. Short ones have a long tail: their mean is above their
median, in native by another factor than in low bits. So adjacent rounds are averaged, to `_PASSES`
means of many calls each.

Low bits are taken only where they are surely faster: where the upper end of the 99.5 % interval of
these ratios is at most 1. And they must save `MARGIN` of native's time in the middle. Of fewer
rounds than an interval needs, all must save that much. A dozen decisions are made, by size and
collective, and none is to be chance. (With 95 %, on 2 cores with 30 other processes, 2 of 10
decisions for low bits were slower than native.) `comm.policy.bounds` has the interval, and what
counts between two sizes. An interval of the unpaired times, the ratio of the two medians, was wider
wherever it mattered. Of several that are sure, the one with the least middle is taken: the end of a
short interval is the worst of nine rounds, and says little of which is faster. To keep native needs
less: low bits that are slower in all of five rounds or more are timed no longer. Nor is what is
surely slower than other low bits.

Times are looked at after each of eight visits, and no more are taken once they are sure. So where
low bits are just as fast as native, 1 decision in 100 is chance.

All ranks have the same times, and what they do with them is rounded exactly, so all choose alike.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_lowbit.codecs import Codec, Tables
from megatron_lowbit.comm.policy.bounds import (
    ENOUGH,
    Bound,
    interpolate,
    interval,
    near,
    ratio_at,
)
from megatron_lowbit.comm.traffic import Decision

BF16_BYTES = 2
# What low bits must save of native's time: they cost accuracy, and another day scatters otherwise.
MARGIN = 0.1
_SLOWER = 5  # rounds at least, all slower than native: low bits are given up
_PASSES = 24  # their interval is a tenth wider than that of all rounds would be
NATIVE, NATIVE_SCATTER = "native", "native reduce-scatter"


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
    """What was timed; native has no codec and carries nothing."""

    codec: str
    carries: bool
    collective: str

    def __str__(self) -> str:
        return f"{self.codec}{' with carries' if self.carries else ''}"


Rounds = tuple[float, ...]


@dataclass(frozen=True)
class Timings:
    """Milliseconds by case, bytes of the message in BF16, and round.

    Attributes:
        times: At a size native has all rounds, and low bits all or the first of them.
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
            return tuple(count * ms for ms in self.times[Case("", False, collective)][size])
        by_kind = [self.times.get(kind.case(collective), {}).get(size, ()) for kind in kinds]
        if not all(by_kind):
            return ()
        counts = [kind.count for kind in kinds]
        return tuple(
            sum(count * ms for count, ms in zip(counts, each, strict=True))
            for each in zip(*by_kind, strict=True)
        )

    def pass_ms(self, kinds: Sequence[Kind], collective: str, size: int) -> float:
        """Milliseconds of a pass of any size, interpolated; NaN if not timed.

        Native's median; of low bits the middle of what they take of it, in the rounds they had.
        """
        native, points = native_of(collective), dict[int, float]()
        for timed in self.sizes(native):
            rounds = self.pass_times(kinds, native, timed)
            points[timed] = statistics.median(_together(rounds))
        if collective != native:
            bounds = self.bounds(kinds, collective)
            points = {bound.size: bound.middle * points[bound.size] for bound in bounds}
        return interpolate(list(points.items()), size) if points else math.nan

    def compared(
        self, kinds: Sequence[Kind], collective: str, size: int, other: str | None = None
    ) -> list[Rounds]:
        """Times of passes, and by another collective (native, if left out) in the same rounds;
        rounds together; empty if not timed."""
        by_each = (collective, native_of(collective) if other is None else other)
        passes = [self.pass_times(kinds, name, size) for name in by_each]
        count = min(map(len, passes))
        return [_together(one[:count]) for one in passes] if count else []

    def ratios(
        self, kinds: Sequence[Kind], collective: str, size: int, other: str | None = None
    ) -> list[float]:
        """What passes take of the time of `other`, as in `compared`."""
        return _ratios(self.compared(kinds, collective, size, other))

    def bounds(self, kinds: Sequence[Kind], collective: str) -> list[Bound]:
        """By size, ascending: what a pass takes of native's time, in the middle and at worst."""
        found = []
        for size in self.sizes(native_of(collective)):
            if compared := self.compared(kinds, collective, size):
                medians = map(statistics.median, compared)
                found.append(Bound(size, *_surely(_ratios(compared)), *medians))
        return found

    def open_at(self, kinds: Sequence[Kind], collectives: Sequence[str], size: int) -> list[str]:
        """Those of which more rounds could change something; none if one is surely faster."""
        still_open = []
        for name in collectives:
            ratios = self.ratios(kinds, name, size)
            if not ratios:
                still_open.append(name)
                continue
            best, middle, worst = _surely(ratios)
            if len(ratios) >= ENOUGH and _gains(worst, middle):
                return []
            others = (other for other in collectives if other != name)
            is_beaten = any(self._is_slower(kinds, name, other, size) for other in others)
            if best <= 1 - MARGIN and not is_beaten:
                still_open.append(name)
        return still_open

    def _is_slower(self, kinds: Sequence[Kind], collective: str, other: str, size: int) -> bool:
        """Surely, in the rounds that both have."""
        ratios = self.ratios(kinds, collective, size, other)
        return bool(ratios) and _surely(ratios)[0] > 1


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
        sure = {}
        for name, bounds in self._bounds.items():
            worst, middle = ratio_at(bounds, size)
            if native_of(name) == native and _gains(worst, middle):
                sure[name] = middle
        best = min(sure, key=sure.__getitem__, default=native)
        why = "native is kept" if best == native else "faster"
        return Decision(best, f"{why} by {self.source}")

    def perhaps(self, native: str, size: int) -> dict[str, float]:
        """The low-bit collectives that more rounds could show to be faster, and what they take of
        native's time at best.

        Outside of the sizes that were timed the nearest one counts.
        """
        names = [name for name in self.candidates if native_of(name) == native]
        found: dict[str, float] = {}
        for name in names:
            for bound in near(self._bounds[name], size):
                if name in self.timings.open_at(self.kinds, names, bound.size):
                    found[name] = min(found.get(name, math.inf), bound.best)
        return found

    @cached_property
    def _bounds(self) -> dict[str, list[Bound]]:
        return {name: self.timings.bounds(self.kinds, name) for name in self.candidates}


def _ratios(compared: list[Rounds]) -> list[float]:
    return [low / native for low, native in zip(*compared, strict=True)]


def _surely(ratios: Sequence[float]) -> tuple[float, float, float]:
    """What low bits take of native's time at best, in the middle and at worst.

    Of few rounds the ends are a margin apart from what was seen, and of fewer than `_SLOWER` low
    bits may gain, whatever was seen.
    """
    best, middle, worst = interval(ratios)
    few = 1 - MARGIN if len(ratios) < ENOUGH else 1.0
    if len(ratios) < _SLOWER:
        best = min(best, 1.0)
    return best * few, middle, worst / few


def _gains(worst: float, middle: float) -> bool:
    """Whether low bits that take as much of native's time are taken."""
    return worst <= 1 and middle <= 1 - MARGIN


def _together(rounds: Rounds) -> Rounds:
    """Means of rounds that follow each other, at least two each, or the rounds if they are few."""
    count = len(rounds)
    if count < 2 * _PASSES:
        return rounds
    ends = [count * number // _PASSES for number in range(_PASSES + 1)]
    return tuple(statistics.fmean(rounds[a:b]) for a, b in itertools.pairwise(ends))


def native_of(collective: str) -> str:
    """What a collective is measured against."""
    return NATIVE_SCATTER if "reduce-scatter" in collective else NATIVE


def size_text(count: int) -> str:
    """Bytes as in ``512 KB``."""
    for unit, name in ((1 << 20, "MB"), (1 << 10, "KB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} B"
