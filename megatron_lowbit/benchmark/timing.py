"""Times of calls that run one after the other: collectives on every rank of the default group, and
what one process does alone.

Calls follow each other without barriers, as in nccl-tests: a barrier lets the ranks go at times
that differ by milliseconds on shared cores, and that would be timed. The cases take turns in
rounds, so a machine that becomes slower for a while does so for all of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_lowbit.comm.policy.runs import compute
from megatron_lowbit.comm.traffic import Clock

_ROUNDS = 7
# Seconds: a shorter call is made up to three times more, untimed, when its turn comes, since what
# ran before it left other data in the caches and the ranks out of step; a longer one hardly sees
# it.
_SHORT = 0.05
_MOST_LEADS = 3
_MOST_CALLS = 1000  # a turn, in one process: as many events are open on a GPU
_PASS = 96  # calls of a pass, at the most: those of a model with 48 layers

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Milliseconds of a call, each the mean over ranks; how many were timed."""

    median: float
    p10: float
    p90: float
    calls: int


def time_calls(
    calls: list[Call],
    *,
    seconds: float,
    device: torch.device,
    prepare: Call | None = None,
) -> list[Times]:
    """Time every call; on every rank alike, each having been made once before (that warms it up).

    Args:
        calls: The cases.
        seconds: For each case; it is called seven times in any case.
        device: Where they work: a GPU's times are those on its stream.
        prepare: Made before each turn, not timed: what is summed in place grows by the number of
            ranks with every call, and a turn is short enough for it to stay within 2**48.
    """
    once = _once(calls, device)
    most = max(int(48 / math.log2(dist.get_world_size())) - _MOST_LEADS, 1)
    turns = [min(max(math.ceil(seconds / t / _ROUNDS), 1), most) for t in once]
    leads = _leads(once)
    times: list[list[torch.Tensor]] = [[] for _ in calls]
    cases = list(zip(calls, leads, turns, times, strict=True))
    for _ in range(_ROUNDS):
        for call, lead, count, mine in cases:
            if prepare is not None:
                prepare()
            mine.append(_seconds([call] * (lead + count), device)[lead:])
        cases.reverse()  # no case always comes after the same other one
    return [_over_ranks(torch.cat(mine), device, sum(map(len, mine))) for mine in times]


def time_passes(
    calls: list[Call], *, seconds: float, device: torch.device, prepare: Call
) -> list[Times]:
    """Time every call as a model makes it; on every rank alike, each having been made once before.

    A turn is a pass of `_PASS` calls, fewer where they are long. Before each call a rank computes
    (`comm.policy.runs.compute`). What is told are seven means, of a seventh of the passes each: a
    model waits for all of its calls. (8 KB over 2 ranks, native: the median pass takes 0.8 of the
    mean one.)

    Args:
        calls: The cases.
        seconds: For each case, with computing; it has seven passes in any case.
        device: Where they work: a GPU's times are those on its stream.
        prepare: Made before each call, not timed.
    """

    def before() -> None:
        prepare()
        compute(device)

    once = _once(calls, device)
    turns = [min(max(math.ceil(seconds / t / _ROUNDS), 1), _PASS) for t in once]
    means: list[list[torch.Tensor]] = [[] for _ in calls]
    cases = list(zip(calls, _leads(once), turns, means, strict=True))

    def take(rounds: int) -> None:
        for _ in range(rounds):
            for call, lead, count, mine in cases:
                mine.append(_seconds([call] * (lead + count), device, before)[lead:].mean())
            cases.reverse()

    (taken,) = _once([lambda: take(_ROUNDS)], device)
    take(int(_ROUNDS * max(seconds * len(calls) / taken - 1, 0)))
    sevenths = [torch.stack(mine).tensor_split(_ROUNDS) for mine in means]
    return [
        _over_ranks(torch.stack([part.mean() for part in each]), device, len(mine) * count)
        for each, mine, count in zip(sevenths, means, turns, strict=True)
    ]


def time_alone(calls: list[Call], *, seconds: float, device: torch.device) -> list[Times]:
    """Time every call in this process alone, each having been made once before.

    Args:
        calls: The cases, which take turns.
        seconds: For each case; it is called seven times in any case.
        device: Where they work: a GPU's times are those on its stream.
    """
    once = [_seconds([call] * 2, device)[1].item() for call in calls]
    turns = [min(max(math.ceil(seconds / t / _ROUNDS), 1), _MOST_CALLS) for t in once]
    times: list[list[torch.Tensor]] = [[] for _ in calls]
    for _ in range(_ROUNDS):
        for call, count, mine in zip(calls, turns, times, strict=True):
            mine.append(_seconds([call] * (1 + count), device)[1:])
    return [_summary(1000 * torch.cat(mine), sum(map(len, mine))) for mine in times]


def _once(calls: list[Call], device: torch.device) -> list[float]:
    """Seconds of each call on the slowest rank: all ranks must count alike."""
    seconds = torch.cat([_seconds([call], device) for call in calls]).to(device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.tolist()


def _leads(once: list[float]) -> list[int]:
    """How many calls of a turn are not timed."""
    return [min(int(_SHORT / seconds), _MOST_LEADS) for seconds in once]


def _seconds(calls: list[Call], device: torch.device, before: Call | None = None) -> torch.Tensor:
    """fp64 ``[len(calls)]``: this rank's times of calls back to back, or with something before."""
    clocks = []
    for call in calls:
        if before is not None:
            before()
        clock = Clock(device)
        call()
        clocks.append(clock.stop())
    return torch.tensor([clock.seconds() for clock in clocks], dtype=torch.float64)


def _over_ranks(seconds: torch.Tensor, device: torch.device, calls: int) -> Times:
    """Of each value the mean over ranks."""
    seconds = seconds.to(device)
    dist.all_reduce(seconds)
    return _summary(1000 * seconds.cpu() / dist.get_world_size(), calls)


def _summary(milliseconds: torch.Tensor, calls: int) -> Times:
    at = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    median, p10, p90 = torch.quantile(milliseconds, at).tolist()
    return Times(median, p10, p90, calls)
