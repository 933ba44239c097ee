"""Collectives timed on the group that will use them, in a few seconds when a model is loaded.

What is timed is what will run: `all_reduce` and `reduce_scatter` themselves, with the model's own
codecs and tables, carries taken and given, over symmetric memory where messages go that way. Each
size is timed in rounds (`comm.policy.timings`), one call of every case after the other without
barriers, the order turned round from round to round. The ranks agree on what there is time for, so
all make the same calls. Counters, carries of the model and random numbers are left alone. Kernels
are compiled before the clock starts.

On a GPU the times are those on the stream, of calls that no CUDA graph holds. What it costs to
launch a call is in them, which is more for low bits than for native.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.comm.agreement import gather_values
from megatron_lowbit.comm.all_reduce import all_reduce
from megatron_lowbit.comm.feedback.chain import ErrorFeedback
from megatron_lowbit.comm.policy.policy import Policy
from megatron_lowbit.comm.policy.timings import (
    BF16_BYTES,
    NATIVE,
    NATIVE_SCATTER,
    Case,
    Kind,
    Rounds,
    Timings,
)
from megatron_lowbit.comm.reduce_scatter import reduce_scatter
from megatron_lowbit.comm.traffic import Clock
from megatron_lowbit.comm.transport import native_reduce_scatter

SECONDS = 4.5  # with what starts and ends it, 5 at the most
# A message of a token, then four times as long each.
_GROWTH = 4
LARGEST = 64 << 20
# A size is visited several times, so that its rounds are spread over all of the time: a machine
# that is busy for a second must not decide. The first visits, size after size, get a share of it.
_ROUNDS, _VISITS, _FIRST = 3, 8, 0.6

Call = Callable[[Tensor], object]


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


def time_collectives(
    kinds: Sequence[Kind],
    place: Place,
    *,
    seconds: float = SECONDS,
    sizes: Sequence[int] | None = None,
) -> Timings:
    """Time native and low bits; call it on every rank of the group alike.

    Args:
        kinds: Sync points of a pass, all of one hidden size.
        place: Where.
        seconds: For all of it.
        sizes: Bytes of the messages in BF16, rounded down to whole tokens (at least one), however
            long they take. If left out, in steps of 4 from one token on, as far as there is time.

    Returns:
        The same times on every rank: the means over ranks.
    """
    hidden, ranks = kinds[0].tables.hidden, dist.get_world_size(place.group)
    families = [(_all_reduces(kinds, place), 1)]
    if place.scatters:
        families.append((_scatters(kinds, place), ranks))
    found: dict[Case, dict[int, Rounds]] = {}
    for calls, multiple in families:
        family = _Family(calls, hidden, place)
        tokens = _tokens(sizes, hidden, multiple, place.largest)
        family.measure(tokens, seconds / len(families), all_sizes=sizes is not None)
        found |= family.times()
    return Timings(found)


def _tokens(sizes: Sequence[int] | None, hidden: int, multiple: int, largest: int) -> list[int]:
    """Of each message, ascending; `multiple` ranks divide them."""
    row = BF16_BYTES * hidden * multiple
    if sizes is not None:
        return sorted({max(size // row, 1) * multiple for size in sizes})
    tokens = [multiple]
    while tokens[-1] // multiple * _GROWTH * row <= largest:
        tokens.append(tokens[-1] * _GROWTH)
    return tokens


def _all_reduces(kinds: Sequence[Kind], place: Place) -> dict[Case, Call]:
    """In place, as Megatron's own."""
    group = place.group
    calls: dict[Case, Call] = {
        Case("", False, NATIVE): lambda x: dist.all_reduce(x, group=group),
    }
    for collective, policy in place.policies.items():
        call = partial(all_reduce, collective=policy, in_place=True)
        calls |= _of_kinds(call, kinds, collective, place)
    return calls


def _scatters(kinds: Sequence[Kind], place: Place) -> dict[Case, Call]:
    group, ranks = place.group, dist.get_world_size(place.group)

    def native(x: Tensor) -> None:
        out = x.new_empty(len(x) // ranks, *x.shape[1:])
        native_reduce_scatter(out, x, group=group)

    calls: dict[Case, Call] = {Case("", False, NATIVE_SCATTER): native}
    call = partial(reduce_scatter, collective=Policy("one-shot"))
    return calls | _of_kinds(call, kinds, "reduce-scatter", place)


def _of_kinds(
    call: Callable[..., Tensor], kinds: Sequence[Kind], collective: str, place: Place
) -> dict[Case, Call]:
    """`call` as the sync points of a pass make it: each takes what the one before it gave."""
    feedback = ErrorFeedback()
    return {
        kind.case(collective): partial(
            call,
            group=place.group,
            codec=kind.codec,
            tables=kind.tables.to(place.device),
            feedback=feedback if kind.carries else None,
        )
        for kind in kinds
    }


class _Family:
    """Cases that are timed together, at one size after the other."""

    def __init__(self, calls: dict[Case, Call], hidden: int, place: Place):
        self._cases, self._calls = list(calls), list(calls.values())
        self._hidden, self._place = hidden, place
        self._found: dict[int, list[list[float]]] = {}  # by tokens: rounds of all cases
        self._costs: dict[int, float] = {}  # seconds of a round
        self._compiling = 0.0  # seconds by which first rounds were longer than the next

    def times(self) -> dict[Case, dict[int, Rounds]]:
        """Milliseconds by case, bytes and round."""
        row = BF16_BYTES * self._hidden
        return {
            case: {
                row * tokens: tuple(each[number] for each in rounds)
                for tokens, rounds in self._found.items()
            }
            for number, case in enumerate(self._cases)
        }

    def measure(self, tokens: list[int], seconds: float, *, all_sizes: bool) -> None:
        """Take times within `seconds`; if `all_sizes` are wanted, however long they take."""
        for _ in range(2):  # compiles, the second time with a carry to take
            self._round(self._partial(tokens[0]))
        start = time.perf_counter()

        def left() -> float:
            return seconds + self._compiling - self._most(time.perf_counter() - start)

        for count in tokens:
            spare = math.inf if all_sizes else left() - (1 - _FIRST) * seconds
            if not self._reach(count, spare):
                break
        for _ in range(_VISITS - 1):
            for count, cost in self._costs.items():
                if (1 + _ROUNDS) * cost <= left():
                    mine = self._partial(count)
                    self._round(mine)  # gives what the next ones take
                    self._take(count, mine)

    def _reach(self, tokens: int, seconds: float) -> bool:
        """Visit a size for the first time, unless that is longer than `seconds`."""
        shorter = max(self._costs, default=0)
        if shorter and tokens / shorter * self._costs[shorter] > seconds:
            return False
        mine = self._partial(tokens)
        first = self._seconds(mine)  # its buffers and pages; kernels that are new at this size
        cost = self._seconds(mine)
        self._compiling += max(first - cost, 0)
        if shorter and (1 + _ROUNDS) * cost > seconds:
            return False
        self._costs[tokens] = cost
        self._take(tokens, mine)
        return True

    def _seconds(self, mine: Tensor) -> float:
        """Of a round, on the slowest rank."""
        start = time.perf_counter()
        self._round(mine)
        return self._most(time.perf_counter() - start)

    def _take(self, tokens: int, mine: Tensor) -> None:
        """Some rounds at one size: milliseconds, means over ranks."""
        rounds = [self._round(mine, backwards=number % 2 == 1) for number in range(_ROUNDS)]
        over_ranks = gather_values(rounds, group=self._place.group)
        for of_ranks in zip(*over_ranks, strict=True):
            means = [1000 * sum(each) / len(each) for each in zip(*of_ranks, strict=True)]
            self._found.setdefault(tokens, []).append(means)

    def _round(self, mine: Tensor, *, backwards: bool = False) -> list[float]:
        """Seconds of each call on this rank. Before each the partial is put back, as just made."""
        x, clocks = mine.clone(), []
        for call in reversed(self._calls) if backwards else self._calls:
            x.copy_(mine)
            clock = Clock(x.device)
            call(x)
            clocks.append(clock.stop())
        seconds = [clock.seconds() for clock in clocks]
        return seconds[::-1] if backwards else seconds

    def _partial(self, tokens: int) -> Tensor:
        """``[tokens, hidden]`` of this rank; nobody else's random numbers are used up."""
        place = self._place
        generator = torch.Generator().manual_seed(dist.get_rank(place.group))
        part = torch.randn(min(tokens, 256), self._hidden, generator=generator).to(place.dtype)
        return part.repeat(-(-tokens // len(part)), 1)[:tokens].contiguous().to(place.device)

    def _most(self, seconds: float) -> float:
        """The largest over ranks, the same on all of them."""
        return max(gather_values(seconds, group=self._place.group))
