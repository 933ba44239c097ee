"""Rounds of calls, at one message size after the other: how times of collectives are taken.

A round calls one case after the other without barriers, and the next round in the other order.
Each size is visited several times, so that its rounds are spread over all of the time: a machine
that is busy for a second must not decide. The sizes share the time. A size is done with when more
rounds would change nothing (`Timings.settled`), and the others have what is left.

Short messages need many rounds. Over Gloo on two cores of a Xeon, 4 ranks, 128 KB, native took 2 to
10 ms and one-shot 2 to 5: it saves a third, which 24 rounds saw in 7 of 100 tries, and 96 in 38 to
66 of them (by the interval of the median, which needs twice as many as the one that is used now).

On a CPU a rank computes before each call, as it does between two sums of a model. Calls without a
pause let ranks fall into step and stay there: native then took 2.2 ms in some runs and 4.7 in
others at 128 KB over 4 ranks. Over 2 ranks at 1 Gbit/s one-shot was 1.3 times as fast as native
without a pause, and is 0.7 times as fast with one.

The ranks agree on what there is time for, so all make the same calls. Kernels are compiled before
the clock starts.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.comm.agreement import gather_values
from megatron_lowbit.comm.policy.policy import Policy
from megatron_lowbit.comm.policy.timings import BF16_BYTES, Case, Kind, Rounds, Timings
from megatron_lowbit.comm.traffic import Clock

LARGEST = 64 << 20
# The first visits, size after size, get a share of the time.
_VISITS, _FIRST = 8, 0.6
_ROUNDS = 3  # of a first visit
# Seconds of a call in the mean, beyond which a call hardly scatters: a few turns of the scheduler.
_LONG = 0.01
_COMPUTING = 0.0005  # seconds, before each call

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
    """

    group: dist.ProcessGroup
    policies: dict[str, Policy]
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    scatters: bool = True
    largest: int = LARGEST


class Family:
    """Cases that are timed together.

    Args:
        make_calls: What is called, by case, native first; it may be called several times, but is
            called once where calls are long. Made for each size, so that each has carries of its
            own.
        kinds: The sync points of a pass.
        place: Where.
    """

    def __init__(self, make_calls: Callable[[], Calls], kinds: Sequence[Kind], place: Place):
        self._make_calls, self._cases = make_calls, list(make_calls())
        self._kinds, self._hidden, self._place = kinds, kinds[0].tables.hidden, place
        self._sizes: list[_Size] = []
        self._waiting: list[int] = []  # tokens of sizes that are not reached yet, the longest first
        self._compiling = 0.0  # seconds by which first rounds were longer than the next
        self._are_long = False  # the calls of this size and longer ones

    @property
    def timings(self) -> Timings:
        """What was found so far."""
        times: dict[Case, dict[int, Rounds]] = {case: {} for case in self._cases}
        for size in self._sizes:
            for number, case in enumerate(size.cases):
                times[case][size.bytes] = tuple(each[number] for each in size.found)
        return Timings({case: points for case, points in times.items() if points})

    def measure(self, tokens: list[int], seconds: float, most: int, *, all_sizes: bool) -> None:
        """Take times within `seconds`; if `all_sizes` are wanted, however long they take.

        A size has `most` rounds at the most.
        """
        compiled = self._size(tokens[0])
        for _ in range(2):  # compiles, the second time with a carry to take
            compiled.seconds()
        start = time.perf_counter()

        def left() -> float:
            return seconds + self._compiling - _most(time.perf_counter() - start, self._place)

        self._waiting = tokens[::-1]
        while self._reach(math.inf if all_sizes else left() - (1 - _FIRST) * seconds):
            pass
        for visits in range(_VISITS - 1, 0, -1):
            while not (unsettled := self._unsettled()) and self._reach(left()):
                pass
            if not unsettled:
                break
            share = left() / (visits * len(unsettled))
            for size in unsettled:
                rounds = max(min(int(share / size.cost), most // _VISITS), 1)
                if rounds * size.cost <= left():
                    size.cost = size.take(rounds)

    def _reach(self, seconds: float) -> bool:
        """Visit the next size for the first time; False if none is left for so many `seconds`."""
        if not self._waiting or (2 + _ROUNDS) * self._expected(self._waiting[-1]) > seconds:
            return False
        size = self._size(self._waiting.pop())
        first = size.seconds()  # its buffers and pages; kernels that are new at this size
        size.cost = size.seconds()
        self._compiling += max(first - size.cost, 0)
        if self._sizes and (1 + _ROUNDS) * size.cost > seconds:
            self._waiting.clear()
            return False
        if not self._are_long and min(first, size.cost) > _LONG * len(size.cases):
            self._are_long = True
            size.call_native_once()
        self._sizes.append(size)
        size.cost = size.take(_ROUNDS)
        return True

    def _expected(self, tokens: int) -> float:
        """Seconds of a round at a size, by what each token more took last; the first is free."""
        if not self._sizes:
            return -math.inf
        inner, last = self._sizes[-2:][0], self._sizes[-1]
        if len(inner.cases) != len(last.cases) or inner is last:
            return last.cost * tokens / last.tokens
        a_token = max(last.cost - inner.cost, 0.0) / (last.tokens - inner.tokens)
        return last.cost + a_token * (tokens - last.tokens)

    def _size(self, tokens: int) -> "_Size":
        size = _Size(tokens, self._hidden, self._make_calls(), self._place)
        if self._are_long:
            size.call_native_once()
        return size

    def _unsettled(self) -> list["_Size"]:
        """The sizes where more rounds could change something; alike on all ranks."""
        collectives = list(dict.fromkeys(case.collective for case in self._cases if case.codec))
        found, kinds = self.timings, self._kinds
        return [size for size in self._sizes if not found.settled(kinds, collectives, size.bytes)]


class _Size:
    """One message size: its calls, and the rounds that were taken of them.

    Attributes:
        cases: What is called, in turn.
        cost: Seconds of a round, on the slowest rank.
        found: Milliseconds of a call of each case, means over ranks, by round.
    """

    def __init__(self, tokens: int, hidden: int, calls: Calls, place: Place):
        self.tokens, self.bytes = tokens, BF16_BYTES * hidden * tokens
        self.cost, self.found, self.cases = 0.0, list[list[float]](), list(calls)
        self._hidden, self._calls, self._place = hidden, list(calls.values()), place

    def call_native_once(self) -> None:
        """Its first case, and those in low bits."""
        kept = [n for n, case in enumerate(self.cases) if case.codec or n == 0]
        self.cases = [self.cases[n] for n in kept]
        self._calls = [self._calls[n] for n in kept]

    def seconds(self) -> float:
        """Of a round, on the slowest rank."""
        mine, start = self._partial(), time.perf_counter()
        self._round(mine)
        return _most(time.perf_counter() - start, self._place)

    def take(self, count: int) -> float:
        """So many rounds; gives the seconds of one, on the slowest rank."""
        mine, start, done = self._partial(), time.perf_counter(), len(self.found)
        rounds = [self._round(mine, backwards=n % 2 == 1) for n in range(done, done + count)]
        over_ranks = gather_values(rounds, group=self._place.group)
        for of_ranks in zip(*over_ranks, strict=True):
            means = [1000 * sum(each) / len(each) for each in zip(*of_ranks, strict=True)]
            self.found.append(means)
        return _most((time.perf_counter() - start) / count, self._place)

    def _round(self, mine: Tensor, *, backwards: bool = False) -> list[float]:
        """Seconds of each call on this rank. Before each the partial is put back, as just made."""
        x, clocks = mine.clone(), []
        for call in reversed(self._calls) if backwards else self._calls:
            x.copy_(mine)
            compute(x.device)
            clock = Clock(x.device)
            call(x)
            clocks.append(clock.stop())
        seconds = [clock.seconds() for clock in clocks]
        return seconds[::-1] if backwards else seconds

    def _partial(self) -> Tensor:
        """``[tokens, hidden]`` of this rank; nobody else's random numbers are used up."""
        place, shape = self._place, (min(self.tokens, 256), self._hidden)
        generator = torch.Generator().manual_seed(dist.get_rank(place.group))
        part = torch.randn(*shape, generator=generator).to(place.dtype)
        whole = part.repeat(-(-self.tokens // len(part)), 1)[: self.tokens]
        return whole.contiguous().to(place.device)


def _most(seconds: float, place: Place) -> float:
    """The largest over ranks, the same on all of them."""
    return max(gather_values(seconds, group=place.group))


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
