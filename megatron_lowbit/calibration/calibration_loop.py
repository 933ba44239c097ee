"""The calibration loop: sequences through the model, summaries into running statistics.

The loop knows nothing of Megatron: it is given a function that runs one sequence through the model
(`forward`) and reads the summaries that observers at the sync points left behind (`Observations`).
A sequence with a NaN or an infinity at any sync point of any rank is left out and reported.

State is saved every `SAVE_EVERY` rounds (`calibration.saved_state`), so that an interrupted run can
go on where it was.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.calibration.saved_state import Checkpointer, Progress
from megatron_lowbit.calibration.statistics import STATISTICS, RunningStatistics, summarize
from megatron_lowbit.errors import LowbitError

SAVE_EVERY = 16


class Observations:
    """Summaries of the present sequence, a row per sync point."""

    def __init__(self, names: list[str], hidden: int):
        self.names = names
        self.summaries = torch.zeros(len(names), len(STATISTICS), hidden)
        self._seen: set[int] = set()

    def observer(self, point: int) -> Callable[[Tensor], None]:
        """A function that notes the partial of sync point number `point`."""

        def observe(partial: Tensor) -> None:
            self.summaries[point] = summarize(partial).to(self.summaries.device)
            self._seen.add(point)

        return observe

    def start(self) -> None:
        """Forget the sequence before."""
        self.summaries.zero_()
        self._seen.clear()

    def require_all(self) -> None:
        """Raise unless the sequence reached every sync point: others would get empty ranges."""
        for point, name in enumerate(self.names):
            if point not in self._seen:
                raise LowbitError(f"{name} was not reached by a forward pass: cannot calibrate it")


def calibrate(
    sequences: Tensor,
    forward: Callable[[Tensor], None],
    observations: Observations,
    statistics: RunningStatistics,
    *,
    checkpointer: Checkpointer,
    progress: Progress,
    dp_group: dist.ProcessGroup | None,
    tp_group: dist.ProcessGroup | None,
    device: torch.device | str,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> None:
    """Run all sequences, fold their summaries into `statistics`, in the corpus's order.

    Args:
        sequences: int64 ``[n, seq_length]``, the same on every rank.
        forward: Runs int64 ``[seq_length]`` through the model.
        observations: What the observers fill during `forward`.
        statistics: Folded into, in place.
        checkpointer: Saves the state.
        progress: Where to start; updated.
        dp_group: The ranks that share the sequences.
        tp_group: The ranks that each hold a part of every partial.
        device: Where the backend of the groups communicates from.
        track: Wraps the rounds, for a progress bar.
    """
    ranks, rank = dist.get_world_size(dp_group), dist.get_rank(dp_group)
    starts = range(progress.done, len(sequences), ranks)
    for number, start in enumerate(track(starts), start=1):
        observations.start()
        # In the last round a rank may have no sequence of its own. It runs the last one, which is
        # not counted twice: experts may be spread over these ranks, so all must take part.
        forward(sequences[min(start + rank, len(sequences) - 1)])
        observations.require_all()
        in_round = _gather(observations.summaries.to(device), dp_group)
        for offset, summaries in enumerate(in_round[: len(sequences) - start]):
            bad = _first_not_finite(summaries, tp_group)
            if bad is None:
                statistics.fold(summaries.cpu(), sequences.shape[1])
            else:
                where = f"sequence {start + offset}: not finite at {observations.names[bad]}"
                progress.skipped.append(where)
        progress.done = min(start + ranks, len(sequences))
        if number % SAVE_EVERY == 0:
            checkpointer.save(statistics, progress)


def gather_over_ranks(result: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[points, statistics, hidden]`` of each rank as ``[points, statistics, ranks, hidden]``."""
    return torch.stack(list(_gather(result, group)), dim=2)


def _gather(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The same tensor of each rank, stacked."""
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, values.contiguous(), group=group)
    return torch.stack(gathered)


def _first_not_finite(summaries: Tensor, tp_group: dist.ProcessGroup | None) -> int | None:
    """Number of the first sync point with a NaN or infinity on any rank of `tp_group`."""
    bad = (~summaries.isfinite()).flatten(1).any(dim=1).int()
    dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=tp_group)
    found = bad.nonzero()
    return int(found[0]) if len(found) else None
