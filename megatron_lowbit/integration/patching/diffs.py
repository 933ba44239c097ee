"""Patch files: unified diffs that `git apply` and `patch` take, and how they are applied here.

Neither git nor patch need be there where Megatron was installed by pip, and both may put a hunk at
the nearest place that looks right. So the files are read by unidiff, which only parses, and a hunk
is applied here by one rule: its old lines, context included, must stand in the file exactly once.
Line numbers are not looked at, and there is no fuzz. That lets one file serve many releases, and
the tests hold it to what `git apply` makes of the same file, byte for byte.
"""

import difflib
import io
from dataclasses import dataclass

from megatron_lowbit.errors import LowbitError

_REMEDY = "run python -m megatron_lowbit patch make"


@dataclass(frozen=True)
class Applied:
    """A text after a patch.

    Attributes:
        text: The text.
        added: Numbers, from 1, of its lines that the patch put in.
    """

    text: str
    added: list[int]


class MisfitError(LowbitError):
    """A hunk whose old lines are not in the file, or more than once."""


@dataclass(frozen=True)
class _Hunk:
    """Lines of the old and of the new text, and which of the new ones were not in the old."""

    old: list[str]
    new: list[str]
    added: list[int]


class Diff:
    """One patch file, of one changed file."""

    def __init__(self, text: str):
        """Parse a patch file.

        Raises:
            LowbitError: It is not a patch of one file.
        """
        from unidiff import PatchSet, UnidiffParseError

        try:
            files = PatchSet(text)
        except UnidiffParseError as error:
            raise LowbitError(f"not a patch file ({error}): {_REMEDY}") from None
        if len(files) != 1:
            raise LowbitError(f"a patch of {len(files)} files, not one: {_REMEDY}")
        self.path = files[0].path
        self._hunks = [_hunk(hunk) for hunk in files[0]]

    def apply(self, text: str) -> Applied:
        """Put the patch into a file's text.

        Raises:
            MisfitError: It does not fit.
        """
        lines, added = lines_of(text), []
        for hunk in self._hunks:
            place = self._place(lines, hunk.old)
            lines[place : place + len(hunk.old)] = hunk.new
            # Hunks are in order: what follows moves nothing that is noted already.
            added += [place + number + 1 for number in hunk.added]
        return Applied("".join(lines), added)

    def revert(self, text: str) -> str:
        """Take the patch out of a file's text.

        Raises:
            MisfitError: It is not in there, or was changed since.
        """
        lines = lines_of(text)
        for hunk in self._hunks:
            place = self._place(lines, hunk.new)
            lines[place : place + len(hunk.new)] = hunk.old
        return "".join(lines)

    def _place(self, lines: list[str], block: list[str]) -> int:
        """Where `block` begins, if it is there once."""
        size = len(block)
        places = [n for n in range(len(lines) - size + 1) if lines[n : n + size] == block]
        if len(places) != 1:
            count = "are not" if not places else f"stand {len(places)} times"
            raise MisfitError(f"{self.path}: the lines around {block[0].strip()!r} {count} in it")
        return places[0]


def _hunk(hunk) -> _Hunk:
    new = list(hunk.target_lines())
    added = [number for number, line in enumerate(new) if line.is_added]
    return _Hunk([line.value for line in hunk.source_lines()], [line.value for line in new], added)


def lines_of(text: str) -> list[str]:
    """Lines with their ends, as git and Python's parser count them: only newlines end one."""
    return io.StringIO(text).readlines()


def unified(path: str, old: str, new: str, *, context: int) -> str:
    """The unified diff of one file, as git writes it."""
    lines = difflib.unified_diff(
        lines_of(old),
        lines_of(new),
        f"a/{path}",
        f"b/{path}",
        n=context,
    )
    return f"diff --git a/{path} b/{path}\n" + "".join(lines)
