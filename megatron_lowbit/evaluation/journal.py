"""What an evaluation has measured so far, on disk, so that an interrupted one can go on.

    DIR/identity.json   which evaluation it is: model, index, variants, and what each measure is of
    DIR/partN.jsonl     a line for each unit that data-parallel rank N has finished

The first tensor-parallel rank of the first stage of each data-parallel rank writes, as all of them
have the same scores, and all ranks read all parts: an evaluation can go on with another number of
data-parallel ranks. A line that was cut off in the middle is left out, and its unit measured again.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch.distributed as dist
from pydantic import Field

from megatron_lowbit.comm.agreement import on_every_rank, require_equal
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import write_atomic
from megatron_lowbit.json_files import check_regular, digest, parse_json, read_json
from megatron_lowbit.model.stages import WHOLE, Stages
from megatron_lowbit.schema import Exact, Sha256, validated

_IDENTITY = "identity.json"


class Entry(Exact):
    """One finished unit.

    Attributes:
        measure: The measure's name.
        unit: Its number in the measure.
        record: The scores of the native run and of each variant.
        traffic: Variant -> what it sent for this unit (`evaluation.evaluation_loop`).
    """

    measure: str
    unit: Annotated[int, Field(ge=0)]
    record: dict[str, dict[str, Any]]
    traffic: dict[str, dict[str, int]]

    def to_json(self) -> str:
        """One line, with a checksum: a flipped bit would go unseen into the results."""
        content = self.model_dump()
        return json.dumps({**content, "sha256": digest(content)})

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "a finished unit") -> "Entry":
        """Of one line; LowbitError with `where` if it is none."""
        line = validated(_Line, parse_json(text, where, constant=float), where)
        content = line.model_dump(exclude={"sha256"})
        if digest(content) != line.sha256:
            raise LowbitError(f"{where} is damaged: its checksum does not match")
        return cls(**content)


class _Line(Entry):
    sha256: Sha256


class Journal:
    """The journal of one evaluation in `directory`; `identity` (JSON) says which one it is."""

    def __init__(
        self,
        directory: Path,
        identity: dict,
        *,
        dp_group: dist.ProcessGroup | None,
        tp_group: dist.ProcessGroup | None,
        stages: Stages = WHOLE,
    ):
        self.directory = directory
        self._identity = json.loads(json.dumps(identity))
        self._file: TextIO | None = None
        self._part = directory / f"part{dist.get_rank(dp_group)}.jsonl"
        self._writes = dist.get_rank(tp_group) == stages.number == 0

    def start(self, *, resume: bool) -> list[Entry]:
        """Open the journal, on all ranks; what is there is gone on from, or removed.

        Returns:
            The units that were finished before, the same on every rank.

        Raises:
            LowbitError: On every rank: what is to be resumed is damaged, of another evaluation, or
                not the same for all ranks; or the directory cannot be written to.
        """
        done = on_every_rank(self._read) if resume else []
        require_equal("saved evaluation", len(done))
        if dist.get_rank() == 0 and not resume:
            self.clear()
        dist.barrier()
        on_every_rank(self._write_identity)
        on_every_rank(self._open)
        return done

    def add(self, entry: Entry) -> None:
        """Note a finished unit; on disk when this returns."""
        if self._file is None:
            return
        try:
            self._file.write(entry.to_json() + "\n")
            self._file.flush()
        except OSError as error:  # the system's own, of a full disk, does not name the file
            raise OSError(error.errno, error.strerror, str(self._part)) from None

    def clear(self) -> None:
        """Remove the journal (call on one rank)."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _read(self) -> list[Entry]:
        """All that was saved, checked."""
        path = self.directory / _IDENTITY
        if not path.exists():
            return []
        try:
            differences = list(_differences(read_json(path), self._identity))
            parts = sorted(self.directory.glob("part*.jsonl")) if not differences else []
            entries = [
                Entry.from_json(line, f"{part.name}, line {number}")
                for part in parts
                for number, line in enumerate(_whole_lines(part).splitlines(), start=1)
            ]
        except (OSError, LowbitError) as error:
            raise LowbitError(
                f"cannot resume from {self.directory} ({error}): run without --resume"
            ) from None
        if differences:
            raise LowbitError(
                f"{self.directory} belongs to another evaluation ({'; '.join(differences)}): run "
                "without --resume to start over"
            )
        return entries

    def _write_identity(self) -> None:
        if dist.get_rank() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(self.directory / _IDENTITY, json.dumps(self._identity).encode())

    def _open(self) -> None:
        """Open this rank's part behind its last whole line."""
        if not self._writes:
            return
        if self._part.exists():
            os.truncate(self._part, len(_whole_lines(self._part)))
        self._file = self._part.open("a", encoding="utf-8")


def _whole_lines(path: Path) -> bytes:
    """A part's content up to its last line end."""
    check_regular(path)
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]


def _differences(there: object, here: object, name: str = "") -> Iterator[str]:
    """What differs between two identities, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            yield from _differences(there.get(key), here.get(key), f"{name} {key}".strip())
    elif there != here:
        yield f"{name}: {_short(there)} there, {_short(here)} here"


def _short(value: object) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:12]}..."
