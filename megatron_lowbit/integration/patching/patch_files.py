"""What patches/ holds: the patch files, and manifest.json with the releases that each one fits.

A release is known by its files' checksums. Versions do not tell: core_v0.19.0 calls itself 0.19.1.
"""

import hashlib
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.patching.tree import plain
from megatron_lowbit.json_files import read_json
from megatron_lowbit.schema import Exact, Sha256, validated

NAME = "manifest.json"
_RESTORE = "restore it, or run python -m megatron_lowbit patch make"

# The checksums of a file without a patch and with it.
Sums = dict[Literal["before", "after"], Sha256]


class Release(Exact):
    """Where a release's files come from: its version, and a commit of Megatron-LM or a package."""

    version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    upstream: str


class Patch(Exact):
    """One patch file.

    Attributes:
        file: Its name.
        touches: The file that it changes, in a tree.
        function: The function in it.
        purpose: What it is for.
        removal: When it is no longer needed.
        made_from: The release whose line numbers it has.
        sha256: Of the patch file.
        applies_to: The range of `files`, in words.
        files: For each release the checksums of `touches`, from the oldest to the newest.
        diff: The patch file's text without its header; not in the manifest.
    """

    model_config = ConfigDict(frozen=False)

    file: str
    touches: str
    function: str
    purpose: str
    removal: str
    made_from: str
    sha256: Sha256 = ""
    applies_to: str = ""
    files: dict[str, Sums]
    diff: str = Field(default="", exclude=True)

    def put_in(self, text: str) -> str | None:
        """A file's text with the patch in it; None where it does not fit."""
        return _swap(text, [(_lines(hunk, " -"), _lines(hunk, " +")) for hunk in self._hunks()])

    def take_out(self, text: str) -> str | None:
        """A file's text without the patch; None where it is not in it, or was changed since."""
        return _swap(text, [(_lines(hunk, " +"), _lines(hunk, " -")) for hunk in self._hunks()])

    def _hunks(self) -> list[str]:
        return re.split(r"^@@ .*\n", self.diff, flags=re.MULTILINE)[1:]


class Manifest(Exact):
    """The patch files, and the releases from the oldest to the newest."""

    model_config = ConfigDict(frozen=False)

    format: Literal[1] = 1
    releases: dict[str, Release]
    patches: list[Patch]

    def of(self, path: str) -> list[Patch]:
        """The patch files that change a file."""
        return [patch for patch in self.patches if patch.touches == path]


def read_patches(directory: Path) -> Manifest:
    """Read a folder of patch files.

    Raises:
        LowbitError: It holds no manifest, or one that is not ours, or a patch file that is missing
            or not as it was made.
    """
    path = directory / NAME
    if not path.exists():
        raise LowbitError(f"{directory} holds no {NAME}: name the folder of the patches")
    manifest = validated(Manifest, read_json(path, remedy=_RESTORE), str(path), remedy=_RESTORE)
    for patch in manifest.patches:
        patch.diff = _read_diff(directory / patch.file, patch.sha256)
    return manifest


def _read_diff(path: Path, expected: str) -> str:
    try:
        # git may have checked it out with Windows line ends, or an editor broken its UTF-8.
        text = plain(path.read_bytes(), errors="replace")
    except FileNotFoundError:
        raise LowbitError(f"{path} is missing: {_RESTORE}") from None
    if sha256(text) != expected:
        raise LowbitError(f"{path} was changed by hand: {_RESTORE}")
    return text[text.find("\ndiff --git ") + 1 :]


def sums_of(before: str, after: str) -> Sums:
    """The checksums of a file's text without a patch and with it."""
    return {"before": sha256(before), "after": sha256(after)}


def sha256(text: str) -> str:
    """Checksum of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _lines(hunk: str, marks: str) -> str:
    """The lines of a hunk with one of two marks, behind the end of the line before them."""
    return "\n" + "".join(re.findall(rf"^[{marks}](.*\n)", hunk, re.MULTILINE))


def _swap(text: str, hunks: list[tuple[str, str]]) -> str | None:
    """Put other lines in the place of each hunk's; None where those do not stand there just once.

    Line numbers are not looked at, and there is no fuzz as in git and patch, which take the nearest
    place that looks right. So one file serves many releases.
    """
    text = "\n" + text
    for old, new in hunks:
        if not 0 <= text.find(old) == text.rfind(old):
            return None
        text = text.replace(old, new)
    return text[1:]
