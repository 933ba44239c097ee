"""What patches/ holds: the patch files, and manifest.json with the releases that each one fits.

A release is known by its files' checksums. Versions do not tell: core_v0.19.0 calls itself 0.19.1.
"""

import hashlib
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from megatron_lowbit.errors import LowbitError
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
    """One patch file."""

    model_config = ConfigDict(frozen=False)

    file: str
    touches: str  # the file that it changes, in a tree
    function: str
    purpose: str
    removal: str  # when it is no longer needed
    made_from: str  # the release whose line numbers it has
    sha256: Sha256 = ""  # of the patch file
    applies_to: str = ""  # the range of `files`, in words
    files: dict[str, Sums]  # of `touches` in each release, from the oldest to the newest
    # The patch file's text without its header; not in the manifest.
    diff: str = Field(default="", exclude=True)

    def put_in(self, text: str, *, reverse: bool = False) -> str | None:
        """A file's text with the patch in it, or with `reverse` taken out of it.

        None unless the old lines of each hunk stand there just once. Line numbers are not looked
        at, and there is no fuzz as in git and patch, which take the nearest place that looks right.
        So one file serves many releases.
        """
        text = "\n" + text
        for hunk in re.split(r"^@@ .*\n", self.diff, flags=re.MULTILINE)[1:]:
            old, new = _lines(hunk, " -"), _lines(hunk, " +")
            if reverse:
                old, new = new, old
            if not 0 <= text.find(old) == text.rfind(old):
                return None
            text = text.replace(old, new)
        return text[1:]


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
        path = directory / patch.file
        if not path.exists():
            raise LowbitError(f"{path} is missing: {_RESTORE}")
        # git may have checked it out with Windows line ends, or an editor broken its UTF-8.
        text = plain(path.read_bytes(), errors="replace")
        if sha256(text) != patch.sha256:
            raise LowbitError(f"{path} was changed by hand: {_RESTORE}")
        patch.diff = text[text.find("\ndiff --git ") + 1 :]
    return manifest


def sums_of(before: str, after: str) -> Sums:
    """The checksums of a file's text without a patch and with it."""
    return {"before": sha256(before), "after": sha256(after)}


def sha256(text: str) -> str:
    """Checksum of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def plain(raw: bytes, errors: str = "strict") -> str:
    """A file's text; with plain newlines, where all its lines end as on Windows.

    git checks a file out so with core.autocrlf=true. Other carriage returns stay.
    """
    return (raw.replace(b"\r\n", b"\n") if has_windows_ends(raw) else raw).decode(errors=errors)


def has_windows_ends(raw: bytes) -> bool:
    """Whether every line ends in a carriage return and a newline, and no carriage return else."""
    count = raw.count(b"\r\n")
    return count > 0 and count == raw.count(b"\n") == raw.count(b"\r")


def _lines(hunk: str, marks: str) -> str:
    """The lines of a hunk with one of two marks, behind the end of the line before them."""
    return "\n" + "".join(re.findall(rf"^[{marks}](.*\n)", hunk, re.MULTILINE))
