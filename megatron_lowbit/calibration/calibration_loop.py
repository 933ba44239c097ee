"""The calibration loop: sequences through the model, summaries into running statistics.

The loop knows nothing of Megatron: it is given a function that runs one sequence through the model
(`forward`) and reads the summaries that observers at the sync points left behind (`Observations`).
A sequence with a NaN or an infinity at any sync point of any rank is left out and reported.

State is saved every `SAVE_EVERY` rounds to `directory` (one file a rank, then progress.json), so
that an interrupted run can go on where it was; the finished run removes it.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.calibration.statistics import RunningStatistics, summarize
from megatron_lowbit.comm.agreement import on_every_rank, require_equal
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import write_atomic

SAVE_EVERY = 16
_PROGRESS = "progress.json"


class Observations:
    """Summaries of the present sequence, a row per sync point."""

    def __init__(self, names: list[str], hidden: int):
        self.names = names
        self.summaries = torch.zeros(len(names), 4, hidden)
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


@dataclass
class Progress:
    """What a run has done.

    Attributes:
        done: Sequences taken from the corpus.
        skipped: Messages of the sequences that were left out.
    """

    done: int = 0
    skipped: list[str] = field(default_factory=list)


class Checkpointer:
    """Saves and restores a run's state in `directory`; `identity` says which run it is.

    The state depends on the tensor-parallel rank alone, so the first data-parallel rank writes it
    and a run can be resumed with another number of data-parallel ranks.
    """

    def __init__(
        self,
        directory: Path,
        identity: dict,
        *,
        dp_group: dist.ProcessGroup | None,
        tp_group: dist.ProcessGroup | None,
    ):
        self._directory = directory
        text = json.dumps(identity, sort_keys=True)
        self.identity = hashlib.sha256(text.encode()).hexdigest()
        self._part = dist.get_rank(tp_group) if tp_group else 0
        self._writes = dist.get_rank(dp_group) == 0

    def save(self, statistics: RunningStatistics, progress: Progress) -> None:
        """Save on all ranks; the state before stays valid until this one is whole."""
        on_every_rank(lambda: self._write_state(statistics, progress))
        on_every_rank(lambda: self._write_progress(progress))

    def load(self, statistics: RunningStatistics) -> Progress:
        """Restore `statistics`; fresh progress if nothing was saved.

        Raises:
            LowbitError: On every rank: what was saved is damaged, or of a run with other arguments,
                model or corpus, or not the same for all ranks.
        """
        progress = on_every_rank(lambda: self._read(statistics))
        require_equal("saved calibration state", progress.done)
        return progress

    def clear(self) -> None:
        """Remove everything that was saved (call on one rank)."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _write_state(self, statistics: RunningStatistics, progress: Progress) -> None:
        if not self._writes:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        counts = torch.tensor([statistics.sequences, statistics.tokens])
        data = safetensors.torch.save({"state": statistics.state, "counts": counts})
        write_atomic(self._state_file(progress), data)

    def _write_progress(self, progress: Progress) -> None:
        """Make the states just written the valid ones, then remove the older."""
        if dist.get_rank() != 0:
            return
        content = {"identity": self.identity, **vars(progress)}
        write_atomic(self._directory / _PROGRESS, json.dumps(content).encode())
        for path in self._directory.glob("state_*"):
            if not path.name.startswith(f"state_{progress.done}_"):
                path.unlink(missing_ok=True)

    def _read(self, statistics: RunningStatistics) -> Progress:
        path = self._directory / _PROGRESS
        if not path.is_file():
            return Progress()
        try:
            content = json.loads(path.read_bytes())
            identity, progress = content.pop("identity"), Progress(**content)
            if identity == self.identity:
                state = safetensors.torch.load_file(self._state_file(progress))
                statistics.sequences, statistics.tokens = state["counts"].tolist()
                statistics.state = state["state"]
        except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise LowbitError(
                f"cannot resume from {self._directory} ({error}): run without --resume"
            ) from None
        if identity != self.identity:
            raise LowbitError(
                f"{self._directory} belongs to a calibration with other arguments, model or "
                "corpus: run without --resume to start over"
            )
        return progress

    def _state_file(self, progress: Progress) -> Path:
        return self._directory / f"state_{progress.done}_part{self._part}.safetensors"


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
    """``[points, 4, hidden]`` of each rank as ``[points, 4, ranks, hidden]`` on every rank."""
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
