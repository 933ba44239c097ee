"""A Megatron on disk, and what `python -m megatron_lowbit patch` does to it.

A patch file either is in its file, or fits it, or neither; that is seen from the text, so a fork
that carries the patches in a commit is understood, too. Taking a patch out again in thought gives
the file as it was, and its checksum tells the release. Everything is worked out and checked before
the first file is written, and the files are replaced together.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import replace_together
from megatron_lowbit.integration.patching.edits import EDITS, Edit
from megatron_lowbit.integration.patching.patch_files import (
    Manifest,
    Patch,
    has_windows_ends,
    plain,
    read_patches,
    sha256,
    sums_of,
)

APPLIED, FITS, MISFIT, ABSENT = "applied", "not applied", "does not fit", "no such file"
_VERSION_FILE = "megatron/core/package_info.py"


class Tree:
    """The folder that holds ``megatron/``: a checkout, or where pip installed or unpacked it.

    A file of it is named by its path in there.
    """

    def __init__(self, root: Path):
        """Look at a folder; raises LowbitError if it holds no Megatron."""
        self.root = root
        info = self.read(_VERSION_FILE)
        if info is None:
            raise LowbitError(
                f"{root} holds no {_VERSION_FILE}: name a Megatron-LM checkout, or the folder that "
                "pip show megatron-core calls its Location"
            )
        numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) *= *(\d+)", info, re.MULTILINE))
        if len(numbers) < 3:
            raise LowbitError(f"{root / _VERSION_FILE} names no version: not a Megatron we know")
        self.version = "{MAJOR}.{MINOR}.{PATCH}".format(**numbers)

    def read(self, path: str) -> str | None:
        """A file's text, as `plain` gives it; None if there is no such file.

        megatron-core's packages before 0.17 lack some.
        """
        if not (self.root / path).is_file():
            return None
        try:
            return plain((self.root / path).read_bytes())
        except UnicodeDecodeError as error:
            raise LowbitError(f"{self.root / path} is not UTF-8 ({error})") from None

    def committed(self, path: str) -> str | None:
        """A file's text in git's last commit; None where git does not know the file."""
        raw = self._git("show", f"HEAD:./{path}")
        return None if raw is None else plain(raw, errors="replace")

    def commit(self) -> str | None:
        """The commit that is checked out; None where git does not know these files."""
        raw = self._git("rev-parse", "HEAD")
        return raw.decode().strip() if raw and self.committed(_VERSION_FILE) else None

    def _git(self, *arguments: str) -> bytes | None:
        """What git prints; None where there is no git, or where it fails."""
        try:
            command = ["git", "-C", str(self.root), *arguments]
            return subprocess.run(command, capture_output=True, check=True).stdout
        except (FileNotFoundError, subprocess.CalledProcessError):
            return None


@dataclass(frozen=True)
class FileState:
    """The file of an edit, without and with the patch that is in it or fits it."""

    edit: Edit
    state: str  # APPLIED, FITS, MISFIT or ABSENT
    patch: Patch | None = None
    before: str = ""  # what is there, if no patch fits
    after: str = ""


class State(Tree):
    """A Megatron as the patches see it.

    Attributes:
        files: For each edit what its file is like.
        release: The release that all files are of, patches taken out; None for an unlisted one.
        dirty: Files that differ from that, or in a git checkout from its last commit, by more than
            the patches.
    """

    def __init__(self, root: Path, patches: Path):
        """Look at a folder that holds ``megatron/``, with the patch files of another.

        Raises:
            LowbitError: No Megatron, no patches, or a patch that would change another function.
        """
        super().__init__(root)
        manifest = read_patches(patches)
        self.files = [_look_at(edit, self.read(edit.path), manifest) for edit in EDITS]
        there = [file for file in self.files if file.state != ABSENT]
        if not there:
            raise LowbitError(f"{root} has none of the files that the patches change: no Megatron")
        self.release = _release(manifest, there)
        changed = [] if self.release else [f for f in there if self._is_dirty(manifest, f)]
        self.dirty = [file.edit.path for file in changed]

    def __str__(self) -> str:
        known = f"the files of {self.release}" if self.release else "not a listed release"
        changed = "".join(f"; {path} has changes of yours" for path in self.dirty)
        lines = [f"{self.root}: megatron-core {self.version}, {known}{changed}"]
        lines += [f"  {f.edit.name:<18} {f.state:<13} {f.edit.path}" for f in self.files]
        return "\n".join(lines)

    def require_usable(self, *, unlisted: bool, dirty: bool) -> None:
        """Raise LowbitError for a tree that only a flag makes us touch, or that no patch fits."""
        if self.dirty and not dirty:
            raise LowbitError(
                f"{self.dirty[0]} in {self.root} has changes of yours: commit or undo them, or "
                "pass --dirty"
            )
        if not self.release and not self.dirty and not unlisted:
            raise LowbitError(
                f"{self.root} (megatron-core {self.version}) is not a release that "
                "patches/manifest.json lists: pass --unlisted to try, or add it by "
                "python -m megatron_lowbit patch make"
            )
        for file in self.files:
            path = self.root / file.edit.path
            if file.state == MISFIT and "\r\n" in file.before:
                raise LowbitError(
                    f"{path}: some of its lines end as on Windows and others do not, and no patch "
                    "fits: end all alike"
                )
            if file.state == MISFIT:
                raise LowbitError(
                    f"{file.edit.name}.patch does not fit {path}: make one for this release by "
                    "python -m megatron_lowbit patch make"
                )

    def apply(self) -> list[str]:
        """Put in the patches that are not in; gives their names. On an error none is put in."""
        return self._replace([(f.edit, f.after) for f in self.files if f.state == FITS])

    def revert(self) -> list[str]:
        """Take out the patches that are in; gives their names. On an error none is taken out."""
        return self._replace([(f.edit, f.before) for f in self.files if f.state == APPLIED])

    def _replace(self, texts: list[tuple[Edit, str]]) -> list[str]:
        """Write the files, their lines ended as they are in them now."""
        contents = {}
        for edit, text in texts:
            path = self.root / edit.path
            end = "\r\n" if has_windows_ends(path.read_bytes()) else "\n"
            contents[path] = text.replace("\n", end).encode()
        replace_together(contents)
        return [edit.name for edit, _ in texts]

    def _is_dirty(self, manifest: Manifest, file: FileState) -> bool:
        """Whether a file has changes that are not upstream's, committed, or the patch's."""
        committed = self.committed(file.edit.path)
        if committed is not None:
            return committed not in (file.before, file.after)
        names = [name for name, one in manifest.releases.items() if one.version == self.version]
        entries = [patch.files for patch in manifest.of(file.edit.path)]
        listed = {entry[name]["before"] for entry in entries for name in names if name in entry}
        return bool(listed) and sha256(file.before) not in listed


def _look_at(edit: Edit, text: str | None, manifest: Manifest) -> FileState:
    """An edit's file, with the first of its patch files that is in it, else the first that fits."""
    if text is None:
        return FileState(edit, ABSENT)
    for patch in manifest.of(edit.path):
        if (before := patch.put_in(text, reverse=True)) is not None:
            return FileState(edit, APPLIED, patch, before, text)
    for patch in manifest.of(edit.path):
        if (after := patch.put_in(text)) is not None:
            edit.require_inside(text, after)
            return FileState(edit, FITS, patch, text, after)
    return FileState(edit, MISFIT, None, text, text)


def _release(manifest: Manifest, files: list[FileState]) -> str | None:
    """The newest release that every file is of, unpatched or exactly as the manifest has it."""
    found = list(manifest.releases)
    for file in files:
        sums = sums_of(file.before, file.after)
        listed = file.patch.files if file.patch else {}
        found = [name for name in found if listed.get(name) == sums]
    return found[-1] if found else None
