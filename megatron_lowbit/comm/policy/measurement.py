"""Collectives timed on the group that will use them, in a few seconds when a model is loaded.

What is timed is what will run: `all_reduce` and `reduce_scatter` themselves, with the model's own
codecs and tables, carries taken and given, over symmetric memory where messages go that way. Each
size is timed in rounds (`comm.policy.timings`), one call of every case after the other without
barriers, the order turned round from round to round. The ranks agree after each size on how many
rounds there is time for, so all make the same calls. Counters, carries of the model and random
numbers are left alone. Kernels are compiled before the clock starts.

On a GPU the times are those on the stream, of calls that no CUDA graph holds. What it costs to
launch a call is in them, which is more for low bits than for native.
"""

import time
from collections.abc import Callable, Iterator, Sequence
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
# Of fewer rounds nothing could be said; more hardly narrow an interval.
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 15

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
    hidden = kinds[0].tables.hidden
    families = [(_all_reduces(kinds, place), 1)]
    if place.scatters:
        families.append((_scatters(kinds, place), dist.get_world_size(place.group)))
    found: dict[Case, dict[int, Rounds]] = {}
    for calls, multiple in families:
        tokens = _tokens(sizes, hidden, multiple, place.largest)
        share = seconds / len(families)
        for size, times in _time_sizes(calls, tokens, hidden, place, share, sizes is not None):
            for case, rounds in zip(calls, times, strict=True):
                found.setdefault(case, {})[size] = rounds
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
        for kind in kinds:
            call = partial(all_reduce, collective=policy, in_place=True)
            calls[kind.case(collective)] = _of_kind(call, kind, place)
    return calls


def _scatters(kinds: Sequence[Kind], place: Place) -> dict[Case, Call]:
    group, ranks = place.group, dist.get_world_size(place.group)

    def native(x: Tensor) -> None:
        out = x.new_empty(len(x) // ranks, *x.shape[1:])
        native_reduce_scatter(out, x, group=group)

    calls: dict[Case, Call] = {Case("", False, NATIVE_SCATTER): native}
    for kind in kinds:
        call = partial(reduce_scatter, collective=Policy("one-shot"))
        calls[kind.case("reduce-scatter")] = _of_kind(call, kind, place)
    return calls


def _of_kind(call: Callable[..., Tensor], kind: Kind, place: Place) -> Call:
    """`call` as the sync points of `kind` make it: each takes what the one before it gave."""
    feedback = ErrorFeedback() if kind.carries else None
    tables = kind.tables.to(place.device)
    return partial(call, group=place.group, codec=kind.codec, tables=tables, feedback=feedback)


def _time_sizes(
    calls: dict[Case, Call],
    tokens: list[int],
    hidden: int,
    place: Place,
    seconds: float,
    all_sizes: bool,
) -> Iterator[tuple[int, list[Rounds]]]:
    """Of each size that there is time for: its bytes in BF16, and the rounds of each case."""
    each = list(calls.values())
    _round(each, _partial(tokens[0], hidden, place), place)  # compiles
    start, last = time.perf_counter(), 0.0
    for number, count in enumerate(tokens):
        growth = count / tokens[number - 1] if number else 0.0
        left = seconds - _most(time.perf_counter() - start, place)
        if growth * last > left and not all_sizes:
            return
        mine = _partial(count, hidden, place)
        began = time.perf_counter()
        _round(each, mine, place)  # its buffers and pages, and how long a round takes
        last = _most(time.perf_counter() - began, place)
        if number and (1 + _LEAST_ROUNDS) * last > left and not all_sizes:
            return
        share = left / (len(tokens) - number)
        rounds = min(max(int(share / last) - 1, _LEAST_ROUNDS), _MOST_ROUNDS)
        yield BF16_BYTES * count * hidden, _rounds(each, mine, rounds, place)


def _rounds(calls: list[Call], mine: Tensor, rounds: int, place: Place) -> list[Rounds]:
    """Milliseconds of each case by round, means over ranks."""
    by_round = []
    for number in range(rounds):
        order = calls if number % 2 else calls[::-1]
        times = _round(order, mine, place)
        by_round.append(times if number % 2 else times[::-1])
    over_ranks = gather_values(by_round, group=place.group)
    ranks = len(over_ranks)
    return [
        tuple(1000 * sum(of_rank[r][case] for of_rank in over_ranks) / ranks for r in range(rounds))
        for case in range(len(calls))
    ]


def _round(calls: Sequence[Call], mine: Tensor, place: Place) -> list[float]:
    """Seconds of each call on this rank. Before each the partial is put back, as if just made."""
    x, clocks = mine.clone(), []
    for call in calls:
        x.copy_(mine)
        clock = Clock(place.device)
        call(x)
        clocks.append(clock.stop())
    return [clock.seconds() for clock in clocks]


def _partial(tokens: int, hidden: int, place: Place) -> Tensor:
    """``[tokens, hidden]`` of this rank; nobody else's random numbers are used up."""
    generator = torch.Generator().manual_seed(dist.get_rank(place.group))
    part = torch.randn(min(tokens, 256), hidden, generator=generator).to(place.dtype)
    return part.repeat(-(-tokens // len(part)), 1)[:tokens].contiguous().to(place.device)


def _most(seconds: float, place: Place) -> float:
    """The largest over ranks, the same on all of them."""
    return max(gather_values(seconds, group=place.group))
