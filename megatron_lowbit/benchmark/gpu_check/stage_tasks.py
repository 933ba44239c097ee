"""What a process of a stage is told, and what it tells.

A stage's work is a function that takes a `Task` and yields *rows*: dicts, one for each thing that
was checked or measured, as soon as it is known. A row with ``error`` is something that is wrong;
the stage goes on behind it. An exception ends the stage; so does `Skip`, where it cannot run here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_lowbit.errors import LowbitError

Row = dict[str, Any]
Rows = Iterator[Row]
_LONGEST = 300  # characters of an error


class Skip(Exception):
    """The stage cannot run here; the message says why."""


@dataclass(frozen=True)
class Task:
    """What a process of a stage is told.

    Attributes:
        part: Its number among the processes of its stage.
        parts: How many there are.
        directory: That they share, empty at first.
        device: ``cuda``, or ``cpu`` in a rehearsal, where Triton interprets the kernels.
        partials: The file of saved partials, which may be missing.
    """

    part: int
    parts: int
    directory: str
    device: str
    partials: str

    @property
    def is_rehearsal(self) -> bool:
        """Whether few and small shapes are to do."""
        return self.device == "cpu"

    def mine(self, cases: list) -> list:
        """Every `parts`-th of `cases`: all processes together have each once."""
        return cases[self.part :: self.parts]


def words(error: BaseException) -> str:
    """An error in one line."""
    named = str(error) if isinstance(error, LowbitError) else f"{type(error).__name__}: {error}"
    return " ".join(named.split())[:_LONGEST]
