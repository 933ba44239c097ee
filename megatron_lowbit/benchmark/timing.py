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

from megatron_lowbit.comm.policy.rounds import compute
from megatron_lowbit.comm.traffic import Clock

_ROUNDS = 7
# Seconds: a shorter call is made up to three times more, untimed, when its turn comes, since what
# ran before it left other data in the caches and the ranks out of step; a longer one hardly sees
# it.
_SHORT = 0.05
_MOST_LEADS = 3
_MOST_CALLS = 1000  # a turn, in one process: as many events are open on a GPU
_MOST_TURNS = 4000

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Milliseconds of a call, each the mean over ranks."""

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
    call_by_call: bool = False,
) -> list[Times]:
    """Time every call; on every rank alike, each having been made once before (that warms it up).

    Args:
        calls: The cases.
        seconds: For each case; it is called seven times in any case.
        device: Where they work: a GPU's times are those on its stream.
        prepare: Made before each turn, not timed: what is summed in place grows by the number of
            ranks with every call, and a turn is short enough for it to stay within 2**48.
        call_by_call: As in a model: a turn is one call, before which a rank computes
            (`comm.policy.rounds.compute`), and there are as many as `seconds` hold. Calls of a
            longer turn are in or out of step together, so the medians of seven turns differ by
            10 % where the calls do not (8 KB to 64 MB, 2 ranks on 2 cores), and by twice at 128 KB
            over 4 ranks.
    """
    first = torch.tensor([_seconds([call], device).item() for call in calls], dtype=torch.float64)
    once = _over_ranks(first, dist.ReduceOp.MAX, device).tolist()  # all ranks must count alike
    most = max(int(48 / math.log2(dist.get_world_size())) - _MOST_LEADS, 1)
    turns = [min(max(math.ceil(seconds / t / _ROUNDS), 1), most) for t in once]
    leads, rounds = [min(int(_SHORT / t), _MOST_LEADS) for t in once], _ROUNDS
    if call_by_call:
        rounds = min(max(int(seconds / max(once)), _ROUNDS), _MOST_TURNS)
        turns, leads = [1] * len(calls), [0] * len(calls)
    times: list[list[torch.Tensor]] = [[] for _ in calls]
    cases = list(zip(calls, leads, turns, times, strict=True))
    for _ in range(rounds):
        for call, lead, count, mine in cases:
            if prepare is not None:
                prepare()
            if call_by_call:
                compute(device)
            mine.append(_seconds([call] * (lead + count), device)[lead:])
        cases.reverse()  # no case always comes after the same other one
    means = [_over_ranks(torch.cat(mine), dist.ReduceOp.SUM, device) for mine in times]
    return [_summary(1000 * mean / dist.get_world_size()) for mean in means]


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
    return [_summary(1000 * torch.cat(mine)) for mine in times]


def _seconds(calls: list[Call], device: torch.device) -> torch.Tensor:
    """fp64 ``[len(calls)]``: this rank's times of calls back to back."""
    clocks = []
    for call in calls:
        clock = Clock(device)
        call()
        clocks.append(clock.stop())
    return torch.tensor([clock.seconds() for clock in clocks], dtype=torch.float64)


def _over_ranks(values: torch.Tensor, op, device: torch.device) -> torch.Tensor:
    values = values.to(device)
    dist.all_reduce(values, op=op)
    return values.cpu()


def _summary(milliseconds: torch.Tensor) -> Times:
    at = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    median, p10, p90 = torch.quantile(milliseconds, at).tolist()
    return Times(median, p10, p90, len(milliseconds))
