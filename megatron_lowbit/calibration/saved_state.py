"""The state of a calibration on disk, so that an interrupted one can go on.

    DIR/state_DONE_partN.safetensors   the running statistics of tensor-parallel rank N; of a
                                       pipeline's later stages N goes on
    DIR/progress.json                  which run it is, how far, what was left out: written last

Both carry checksums: a flipped bit would go unseen into a validly signed index. The finished run
removes the directory.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.calibration.statistics import RunningStatistics
from megatron_lowbit.calibration.validation.index_schema import SavedProgress
from megatron_lowbit.comm.agreement import on_every_rank, require_equal
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import write_atomic
from megatron_lowbit.json_files import digest, parse_json, read_json, read_regular
from megatron_lowbit.model.stages import WHOLE, Stages
from megatron_lowbit.schema import validated

_PROGRESS = "progress.json"
_HEADER = 1 << 16  # bytes of a state file besides the state


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

    The state depends on the tensor-parallel rank and the pipeline stage alone, so the first
    data-parallel rank writes it and a run can be resumed with another number of data-parallel
    ranks.
    """

    def __init__(
        self,
        directory: Path,
        identity: dict,
        *,
        dp_group: dist.ProcessGroup | None,
        tp_group: dist.ProcessGroup | None,
        stages: Stages = WHOLE,
    ):
        self._directory = directory
        self.identity = digest(identity)
        self._part = 0
        if tp_group:
            ranks = dist.get_world_size(tp_group)
            self._part = dist.get_rank(tp_group) + ranks * stages.number
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
        tensors = {"state": statistics.state, "counts": counts}
        own = {"sha256": self._digest(tensors, progress)}
        data = safetensors.torch.save(tensors, metadata=own)
        write_atomic(self._state_file(progress), data)

    def _digest(self, tensors: dict[str, Tensor], progress: Progress) -> str:
        """Of the run, of this part of it, of where it stands, and of what it knows."""
        text = json.dumps([self.identity, self._part, vars(progress)])
        found = hashlib.sha256(text.encode())
        for name in ("state", "counts"):
            found.update(tensors[name].contiguous().numpy().tobytes())
        return found.hexdigest()

    def _write_progress(self, progress: Progress) -> None:
        """Make the states just written the valid ones, then remove the older."""
        if dist.get_rank() != 0:
            return
        content = {"identity": self.identity, **vars(progress)}
        content["sha256"] = digest(content)
        write_atomic(self._directory / _PROGRESS, json.dumps(content).encode())
        for path in self._directory.glob("state_*"):
            if not path.name.startswith(f"state_{progress.done}_"):
                path.unlink(missing_ok=True)

    def _read(self, statistics: RunningStatistics) -> Progress:
        path = self._directory / _PROGRESS
        if not path.exists():
            return Progress()
        try:
            saved = validated(SavedProgress, read_json(path), path.name)
            if saved.sha256 != digest(saved.model_dump()):
                raise LowbitError(f"{path.name} is damaged: its checksum does not match")
            progress = Progress(saved.done, list(saved.skipped))
            if saved.identity == self.identity:
                self._read_state(statistics, progress)
        except (OSError, LowbitError) as error:
            raise LowbitError(
                f"cannot resume from {self._directory} ({error}): run without --resume"
            ) from None
        if saved.identity != self.identity:
            raise LowbitError(
                f"{self._directory} belongs to a calibration with other arguments, model or "
                "corpus: run without --resume to start over"
            )
        return progress

    def _read_state(self, statistics: RunningStatistics, progress: Progress) -> None:
        """Restore this part's statistics."""
        path, shape = self._state_file(progress), statistics.state.shape
        data = read_regular(path, largest=8 * shape.numel() + _HEADER)
        try:
            tensors = safetensors.torch.load(data)
        except (safetensors.SafetensorError, ValueError, RuntimeError, KeyError) as error:
            raise LowbitError(f"{path.name} is damaged: {error}") from None
        kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        wanted = {"state": (torch.float64, shape), "counts": (torch.int64, torch.Size([2]))}
        if kinds != wanted:
            raise LowbitError(f"{path.name} is damaged: it does not have the tensors of this run")
        length = int.from_bytes(data[:8], "little")
        header = parse_json(data[8 : 8 + length], f"the header of {path.name}")
        if header.get("__metadata__") != {"sha256": self._digest(tensors, progress)}:
            raise LowbitError(f"{path.name} is damaged: its checksum does not match")
        statistics.sequences, statistics.tokens = tensors["counts"].tolist()
        statistics.state = tensors["state"]

    def _state_file(self, progress: Progress) -> Path:
        return self._directory / f"state_{progress.done}_part{self._part}.safetensors"
