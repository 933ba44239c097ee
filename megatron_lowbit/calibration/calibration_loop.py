"""The calibration loop: sequences through the model, summaries into running statistics.

The loop knows nothing of Megatron: it is given a function that runs one sequence through the model
(`forward`) and reads the summaries that observers at the sync points left behind (`Observations`).
A sequence with a NaN or an infinity at any sync point of any rank is left out and reported.

A pipeline's stages each watch sync points of their own, and leave out the same sequences.

State is saved every `SAVE_EVERY` sequences of a rank (`calibration.saved_state`), so that an
interrupted run can go on where it was.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.calibration.saved_state import Checkpointer, Progress
from megatron_lowbit.calibration.statistics import STATISTICS, RunningStatistics, summarize
from megatron_lowbit.comm.agreement import on_every_rank
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.model.stages import WHOLE, Stages

SAVE_EVERY = 16


class Observations:
    """Summaries of the present sequences, for each of them a row per sync point."""

    def __init__(self, names: list[str], hidden: int):
        self.names, self._hidden = names, hidden
        self.summaries = torch.empty(0)
        self._seen = [0] * len(names)

    def observer(self, point: int) -> Callable[[Tensor], None]:
        """A function that notes the partial of sync point number `point`."""

        def observe(partial: Tensor) -> None:
            row = min(self._seen[point], len(self.summaries) - 1)
            self.summaries[row, point] = summarize(partial).to(self.summaries.device)
            self._seen[point] += 1

        return observe

    def start(self, sequences: int = 1) -> None:
        """Forget those before; so many come, one after the other at each sync point."""
        shape = (sequences, len(self.names), len(STATISTICS), self._hidden)
        self.summaries = torch.zeros(shape)
        self._seen = [0] * len(self.names)

    def require_all(self) -> None:
        """Raise unless each sequence reached every sync point: others would get empty ranges."""
        for name, seen in zip(self.names, self._seen, strict=True):
            if seen < len(self.summaries):
                raise LowbitError(f"{name} was not reached by a forward pass: cannot calibrate it")


def calibrate(
    sequences: Tensor,
    forward: Callable[[list[Tensor]], None],
    observations: Observations,
    statistics: RunningStatistics,
    *,
    checkpointer: Checkpointer,
    progress: Progress,
    dp_group: dist.ProcessGroup | None,
    tp_group: dist.ProcessGroup | None,
    device: torch.device | str,
    stages: Stages = WHOLE,
    at_once: int = 1,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> None:
    """Run all sequences, fold their summaries into `statistics`, in the corpus's order.

    Args:
        sequences: int64 ``[n, seq_length]``, the same on every rank.
        forward: Runs int64 ``[seq_length]``, each by itself and in order, through the model.
        observations: What the observers fill during `forward`.
        statistics: Folded into, in place.
        checkpointer: Saves the state.
        progress: Where to start; updated.
        dp_group: The ranks that share the sequences.
        tp_group: The ranks that each hold a part of every partial.
        device: Where the backend of the groups communicates from.
        stages: The pipeline stages, each with sync points of its own.
        at_once: How many sequences of this rank `forward` is given in a round.
        track: Wraps the rounds, for a progress bar.
    """
    ranks, rank, count = dist.get_world_size(dp_group), dist.get_rank(dp_group), len(sequences)
    starts = range(progress.done, count, ranks * at_once)
    for number, start in enumerate(track(starts), start=1):
        progress.done = min(start + ranks * at_once, count)
        firsts = range(start, progress.done, ranks)
        observations.start(len(firsts))
        # At the end a rank may have no sequence of its own. It runs the last one, which is not
        # counted twice: experts may be spread over these ranks, so all must take part.
        forward([sequences[min(first + rank, count - 1)] for first in firsts])
        on_every_rank(observations.require_all)
        for first, mine in zip(firsts, observations.summaries, strict=True):
            of_ranks = _gather(mine.to(device), dp_group)
            for where, summaries in enumerate(of_ranks[: count - first], start=first):
                name = _not_finite(summaries, observations.names, tp_group, stages)
                if name is None:
                    statistics.fold(summaries.cpu(), sequences.shape[1])
                else:
                    progress.skipped.append(f"sequence {where}: not finite at {name}")
        if number % max(1, SAVE_EVERY // at_once) == 0:
            checkpointer.save(statistics, progress)


def gather_over_ranks(result: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[points, statistics, hidden]`` of each rank as ``[points, statistics, ranks, hidden]``."""
    return torch.stack(list(_gather(result, group)), dim=2)


def _gather(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The same tensor of each rank, stacked."""
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, values.contiguous(), group=group)
    return torch.stack(gathered)


def _not_finite(
    summaries: Tensor, names: list[str], tp_group: dist.ProcessGroup | None, stages: Stages
) -> str | None:
    """The first sync point with a NaN or infinity on any rank, the same on all stages."""
    bad = (~summaries.isfinite()).flatten(1).any(dim=1).int()
    dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=tp_group)
    here = next((name for name, is_bad in zip(names, bad.tolist(), strict=True) if is_bad), None)
    return next(filter(None, stages.gather(here)), None)
