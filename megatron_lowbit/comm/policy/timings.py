"""Times of collectives on one group, and which collective they allow: pure functions.

Times are taken in *rounds* (`comm.policy.rounds`): a round calls native and every low-bit case,
one after the other, so what slows the machine for a while slows all of a round. A pass of a model
sums its sync points by one collective, whatever bits each of them has; so what is compared is a
pass: in each round the low-bit times, each as often as the model has such sync points, over as many
of native's (the mean of its calls in the round, see `natives`).

Low bits are taken only where they surely save at least `MARGIN` of native's time: where the upper
end of the 99.5 % interval of these ratios is at most 1 - MARGIN. A dozen decisions are made, by
size and collective, and none is to be chance. (With 95 %, on 2 cores with 30 other processes, 2 of
10 decisions for low bits were slower than native.) `comm.policy.bounds` has the interval, and what
counts between two sizes. An interval of the unpaired times, the ratio of the two medians, was wider
wherever it mattered. Of several that are sure, the one with the least median is taken: the end of a
short interval is the worst of nine rounds, and says little of which is faster.

Times are looked at after each of eight visits, and no more are taken once they are sure. So where
the saving is just short of `MARGIN`, 1 decision in 100 is chance.

All ranks have the same times, and what they do with them is rounded exactly, so all choose alike.
"""

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
    middle_at,
    worst_at,
)
from megatron_lowbit.comm.traffic import Decision

BF16_BYTES = 2
# What low bits must save of native's time: they cost accuracy, and another day scatters otherwise.
MARGIN = 0.1
NATIVE, NATIVE_SCATTER = "native", "native reduce-scatter"
_NATIVES = 5  # calls of native in a round, at the most


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


def natives(native: str, kinds: int) -> list[Case]:
    """Under what a round keeps its calls of native: one for each kind, but no more than five.

    Of low bits a round has a call of each kind. Short calls have a long tail, so that their median
    is below their mean: one call of native beside five in low bits would look faster than it is.
    """
    names = (native, *(f"{native} {number}" for number in range(2, min(kinds, _NATIVES) + 1)))
    return [Case("", False, name) for name in names]


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
            cases = natives(collective, len(kinds))
            own = [self.times[case][size] for case in cases if size in self.times.get(case, {})]
            return tuple(count * sum(each) / len(each) for each in zip(*own, strict=True))
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

    def bounds(self, kinds: Sequence[Kind], collective: str) -> list[Bound]:
        """By size, ascending: what a pass takes at the worst, of native's time."""
        found, native = [], native_of(collective)
        for size in self.sizes(native):
            if ratios := self.ratios(kinds, collective, size):
                by = (self.pass_times(kinds, name, size) for name in (collective, native))
                found.append(Bound(size, interval(ratios)[1], *map(statistics.median, by)))
        return found

    def settled(self, kinds: Sequence[Kind], collectives: Sequence[str], size: int) -> bool:
        """Whether one collective is surely fast enough at a size, or none surely is."""
        by_collective = [self.ratios(kinds, name, size) for name in collectives]
        if any(len(ratios) < ENOUGH for ratios in by_collective):
            return False
        ends = [interval(ratios) for ratios in by_collective]
        one_is = any(upper <= 1 - MARGIN for _, upper in ends)
        return one_is or all(lower > 1 - MARGIN for lower, _ in ends)


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
        sure = {
            name: middle_at(bounds, size)
            for name, bounds in self._bounds.items()
            if native_of(name) == native and worst_at(bounds, size) <= 1 - MARGIN
        }
        best = min(sure, key=sure.__getitem__, default=native)
        why = "native is kept" if best == native else "faster"
        return Decision(best, f"{why} by {self.source}")

    @cached_property
    def _bounds(self) -> dict[str, list[Bound]]:
        return {name: self.timings.bounds(self.kinds, name) for name in self.candidates}


def native_of(collective: str) -> str:
    """What a collective is measured against."""
    return NATIVE_SCATTER if "reduce-scatter" in collective else NATIVE


def size_text(count: int) -> str:
    """Bytes as in ``512 KB``."""
    for unit, name in ((1 << 20, "MB"), (1 << 10, "KB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} B"
