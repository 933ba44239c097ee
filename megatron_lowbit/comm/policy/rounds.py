"""Rounds of calls, at one message size after the other: how times of collectives are taken.

A round has a run of calls for each collective (`comm.policy.runs`), without barriers, and the next
round has them in the other order. Each size is visited several times, so that its rounds are spread
over all of the time: a machine that is busy for a second must not decide. The sizes share the time,
and a long one has no more rounds than its share is enough for. (4 ranks on 2 cores of an EPYC,
loopback: long messages had taken a round a visit, and 4 of 20 decisions up to 512 KB were for low
bits, which take half of native's time there. By shares all were.) A size is done with when
more rounds would change nothing (`Timings.open_at`), and so is a collective that surely gains
nothing. The others have what is left.

The ranks agree on what there is time for, so all make the same calls. Kernels are compiled before
the clock starts.
"""

import math
import time
from collections.abc import Callable, Sequence

from megatron_lowbit.comm.agreement import gather_values
from megatron_lowbit.comm.policy.runs import Calls, Place, Size, longest_run
from megatron_lowbit.comm.policy.timings import Kind, Timings

_VISITS = 8
_ROUNDS = 3  # of a first visit
_FIRST = 1 / 3  # of the time that is left: what a first visit may take


class Family:
    """Cases that are timed together.

    Args:
        make_calls: What is called, by case, all of a collective in a row. Made for each size, so
            that each has carries of its own.
        kinds: The sync points of a pass.
        place: Where.
    """

    def __init__(self, make_calls: Callable[[], Calls], kinds: Sequence[Kind], place: Place):
        self._make_calls, self._cases = make_calls, list(make_calls())
        self._kinds, self._hidden, self._place = kinds, kinds[0].tables.hidden, place
        self._sizes: list[Size] = []
        self._waiting: list[int] = []  # tokens of sizes that are not reached yet, the longest first
        self._seconds: float | None = None  # of the next one's first visit, once it was begun
        self._compiling = 0.0  # seconds by which first rounds were longer than the next

    @property
    def timings(self) -> Timings:
        """What was found so far."""
        return Timings(
            {
                case: {size.bytes: tuple(size.found[case]) for size in self._sizes}
                for case in self._cases
            }
        )

    def measure(self, tokens: list[int], seconds: float, most: int, *, all_sizes: bool) -> None:
        """Take times within `seconds`; if `all_sizes` are wanted, however long they take.

        A size has `most` rounds at the most.
        """
        compiled = self._size(tokens[0])
        for _ in range(2):  # compiles, the second time with a carry to take
            compiled.take(1, keep=False)
        start = time.perf_counter()

        def left() -> float:
            done = gather_values(time.perf_counter() - start, group=self._place.group)
            return seconds + self._compiling - max(done)

        self._waiting = tokens[::-1]
        while self._reach(math.inf if all_sizes else _FIRST * left()):
            pass
        for visits in range(_VISITS - 1, 0, -1):
            while not (still_open := self._open(most)) and self._reach(left()):
                pass
            if not still_open:
                break
            share = _share(left(), [size.spent for size in still_open])
            for size in still_open:
                whole = min(int((share - size.spent) / size.cost), most - size.rounds)
                rounds = min(math.ceil(whole / visits), int(left() / size.cost))
                if rounds > 0:
                    size.take(rounds)

    def _reach(self, seconds: float) -> bool:
        """Visit the next size for the first time; False if none is left for so many `seconds`."""
        if not self._waiting or self._expected(self._waiting[-1]) > seconds:
            return False
        size = self._size(self._waiting[-1])
        first = size.take(1, keep=False)  # its buffers and pages; kernels that are new at this size
        size.take(1)
        self._compiling += max(first - size.once, 0)
        self._seconds = size.once + _ROUNDS * size.cost
        if self._sizes and self._seconds > seconds:
            return False
        self._sizes.append(size)
        self._waiting.pop()
        self._seconds = None
        size.take(_ROUNDS - 1)
        return True

    def _expected(self, tokens: int) -> float:
        """Seconds of a first visit, by what each token more took last; the first size is free."""
        if not self._sizes:
            return -math.inf
        if self._seconds is not None:
            return self._seconds
        inner, last = self._sizes[-2:][0], self._sizes[-1]
        once = last.once * tokens / last.tokens
        if inner is not last:
            a_token = max(last.once - inner.once, 0.0) / (last.tokens - inner.tokens)
            once = last.once + a_token * (tokens - last.tokens)
        runs = len({case.collective for case in self._cases})
        return once + _ROUNDS * (once + runs * longest_run(self._place))

    def _size(self, tokens: int) -> Size:
        return Size(tokens, self._hidden, self._make_calls(), self._place)

    def _open(self, most: int) -> list[Size]:
        """The sizes where more rounds could change something, and that have fewer than `most`;
        alike on all ranks."""
        collectives = list(dict.fromkeys(case.collective for case in self._cases if case.codec))
        found, still_open = self.timings, []
        for size in (one for one in self._sizes if one.rounds < most):
            if among := found.open_at(self._kinds, collectives, size.bytes):
                size.keep(among)
                still_open.append(size)
        return still_open


def _share(left: float, spent: Sequence[float]) -> float:
    """Seconds that each has at the end, spent ones included, if who had less has more of `left`."""
    rising, share = sorted(spent), math.inf
    for count in range(len(rising), 0, -1):
        share = (left + sum(rising[:count])) / count
        if share >= rising[count - 1]:
            break
    return share
