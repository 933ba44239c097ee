"""Runs of calls: what a round of one message size is made of.

A run is what a pass of a model is: the sync points one after the other, all by one collective.
Short calls are made 4 times at load, which leaves time for many rounds, and 64 times for a tuning
file. The first ones are not timed: what ran before leaves the ranks out of step. (2 ranks on 2
cores of an EPYC, 1 Gbit/s, 128 KB: single calls by turns said that one-shot takes 0.87 of native's
time by the medians, and 24 calls in a row that it takes 0.56. Loopback, 2 MB: 0.92 by runs of 4,
0.89, 0.84 and 0.79 by 8, 16 and 32.) Long calls are made once.

On a CPU a rank computes before each call, as it does between two sums of a model. Calls without a
pause let ranks fall into step and stay there: on a Xeon native then took 2.2 ms in some runs and
4.7 in others at 128 KB over 4 ranks. Over 2 ranks at 1 Gbit/s one-shot was 1.3 times as fast as
native without a pause, and 0.7 times as fast with one.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.comm.agreement import gather_values
from megatron_lowbit.comm.policy.policy import Policy
from megatron_lowbit.comm.policy.timings import BF16_BYTES, NATIVE, NATIVE_SCATTER, Case
from megatron_lowbit.comm.traffic import Clock

LARGEST = 64 << 20
# Seconds: of longer calls a run has fewer, so that it takes as long as a run of calls of this.
# Those hardly scatter: they wait for a few turns of the scheduler.
_SHORT = 0.0015
_LEADS = 3  # the first calls of a run that are not timed, at most; a quarter of a shorter one
_COMPUTING = 0.0005  # seconds, before each call
_PERIOD = 256  # tokens, after which a partial repeats itself

Call = Callable[[Tensor], object]
Calls = dict[Case, Call]


@dataclass(frozen=True)
class Place:
    """Where messages are timed.

    Attributes:
        group: The ranks that reduce.
        policies: A fixed policy for each low-bit collective, with what it needs.
        device: Where the partials are.
        dtype: Theirs.
        scatters: Whether to time reduce-scatters, too.
        largest: Bytes in BF16 of the longest message that needs times.
        calls: Of a run of short ones.
    """

    group: dist.ProcessGroup
    policies: dict[str, Policy]
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    scatters: bool = True
    largest: int = LARGEST
    calls: int = 4


class Size:
    """One message size: its runs, and the rounds that were taken of them.

    Attributes:
        cost: Seconds of a round, as they were taken last, on the slowest rank.
        spent: Seconds of those that were kept: others compile kernels, too.
        found: Milliseconds of a call of each case, means of a run and over ranks, by round.
    """

    def __init__(self, tokens: int, hidden: int, calls: Calls, place: Place):
        self.tokens, self.bytes = tokens, BF16_BYTES * hidden * tokens
        self.cost = self.spent = 0.0
        self.found: dict[Case, list[float]] = {case: [] for case in calls}
        self._hidden, self._place, self._done = hidden, place, 0
        by_collective = itertools.groupby(calls.items(), lambda item: item[0].collective)
        self._runs = {name: Run(dict(of_it), place.calls) for name, of_it in by_collective}
        generator = torch.Generator().manual_seed(dist.get_rank(place.group))
        part = torch.randn(min(tokens, _PERIOD), hidden, generator=generator)
        self._part = part.to(place.device, place.dtype)

    @property
    def rounds(self) -> int:
        """How many were kept: native has all of them."""
        return max(map(len, self.found.values()))

    @property
    def once(self) -> float:
        """Seconds of one call of each case, those too that are called no longer."""
        return sum(_COMPUTING + statistics.median(ms) / 1000 for ms in self.found.values())

    def keep(self, collectives: Sequence[str]) -> None:
        """Go on with native and these."""
        kept = (NATIVE, NATIVE_SCATTER, *collectives)
        self._runs = {name: run for name, run in self._runs.items() if name in kept}

    def take(self, count: int, *, keep: bool = True) -> float:
        """So many rounds; gives the seconds of one, on the slowest rank.

        The runs of the next ones are as long as these calls need.
        """
        mine, start = self._partial(), time.perf_counter()
        rounds = [self._round(mine) for _ in range(count)]
        own = (time.perf_counter() - start) / count, rounds
        seconds, over_ranks = zip(*gather_values(own, group=self._place.group), strict=True)
        self.cost = max(seconds)
        means = [
            [sum(each) / len(each) for each in zip(*of_ranks, strict=True)]
            for of_ranks in zip(*over_ranks, strict=True)
        ]
        cases = [case for run in self._runs.values() for case in run.cases]
        by_case = dict(zip(cases, zip(*means, strict=True), strict=True))
        for run in self._runs.values():
            run.fit(statistics.fmean(statistics.median(by_case[case]) for case in run.cases))
        if keep:
            self.spent += count * self.cost
            for case, taken in by_case.items():
                self.found[case] += [1000 * each for each in taken]
        return self.cost

    def _round(self, mine: Tensor) -> list[float]:
        """Seconds of a call of each case on this rank, in the mean."""
        x, step = mine.clone(), -1 if self._done % 2 else 1
        self._done += 1
        clocks = [run.make(x, mine) for run in [*self._runs.values()][::step]]
        of_cases = [of_case for run in clocks[::step] for of_case in run]
        return [statistics.fmean(clock.seconds() for clock in of_case) for of_case in of_cases]

    def _partial(self) -> Tensor:
        """``[tokens, hidden]`` of this rank."""
        return self._part.repeat(math.ceil(self.tokens / _PERIOD), 1)[: self.tokens]


class Run:
    """The calls of one collective in a round.

    Args:
        calls: By case.
        most: How often short ones are made, all cases together.

    Attributes:
        cases: In the order of their calls.
    """

    def __init__(self, calls: Calls, most: int):
        self.cases, self._calls = list(calls), list(calls.values())
        self._most, self._repeats = most, 1

    def fit(self, seconds: float) -> None:
        """Be as long as calls need that take so many seconds."""
        self._repeats = math.ceil(self._most * (_SHORT / max(seconds, _SHORT)))

    def make(self, x: Tensor, mine: Tensor) -> list[list[Clock]]:
        """Clocks of the timed calls of each case; before each call `x` is the partial again."""
        untimed = min(self._repeats // 4, _LEADS)
        turns = -(-(self._repeats - untimed) // len(self._calls))
        clocks = []
        for number in range(-untimed, turns * len(self._calls)):
            x.copy_(mine)
            compute(x.device)
            clock = Clock(x.device)
            self._calls[number % len(self._calls)](x)
            clocks.append(clock.stop())
        return [clocks[untimed + n :: len(self._calls)] for n in range(len(self._calls))]


def longest_run(place: Place) -> float:
    """Seconds at the most that repeats add to one call of each case."""
    return place.calls * (_SHORT + _COMPUTING)


def compute(device: torch.device) -> None:
    """What a rank of a model does between two sums: half a millisecond on a CPU.

    Nothing on a GPU, where launches run ahead of the stream.
    """
    end = time.perf_counter() + _COMPUTING
    while device.type == "cpu" and time.perf_counter() < end:
        torch.mm(*_operands())


@cache
def _operands() -> tuple[Tensor, Tensor]:
    return torch.ones(64, 256), torch.ones(256, 64)
