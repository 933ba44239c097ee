"""What `python -m megatron_lowbit patch` does to a Megatron: check, apply, revert, status.

A patch file either is in its file, or fits it, or neither; that is seen from the text, so a fork
that carries the patches in a commit is understood, too. Taking a patch out again in thought gives
the file as it was, and its checksum tells the release. Everything is worked out and checked before
the first file is written, and the files are replaced together.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import replace_together
from megatron_lowbit.integration.patching.edits import EDITS, Edit
from megatron_lowbit.integration.patching.patch_files import (
    Manifest,
    Patch,
    read_patches,
    sha256,
    sums_of,
)
from megatron_lowbit.integration.patching.tree import Tree

APPLIED, FITS, MISFIT, ABSENT = "applied", "not applied", "does not fit", "no such file"


@dataclass(frozen=True)
class FileState:
    """A file that an edit's patch touches.

    Attributes:
        edit: What is to be changed.
        state: One of APPLIED, FITS, MISFIT and ABSENT.
        patch: The patch file that is in it or fits it.
        before: The text without the patch; what is there, if none fits.
        after: The text with it.
    """

    edit: Edit
    state: str
    patch: Patch | None = None
    before: str = ""
    after: str = ""


class State:
    """A Megatron as the patches see it.

    Attributes:
        tree: The Megatron.
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
        self.tree, manifest = Tree(root), read_patches(patches)
        self.files = [_look_at(edit, self.tree.read(edit.path), manifest) for edit in EDITS]
        there = [file for file in self.files if file.state != ABSENT]
        if not there:
            raise LowbitError(f"{root} has none of the files that the patches change: no Megatron")
        self.release = _release(manifest, there)
        changed = [] if self.release else [f for f in there if _is_dirty(self.tree, manifest, f)]
        self.dirty = [file.edit.path for file in changed]

    def __str__(self) -> str:
        known = f"the files of {self.release}" if self.release else "not a listed release"
        changed = "".join(f"; {path} has changes of yours" for path in self.dirty)
        lines = [f"{self.tree.root}: megatron-core {self.tree.version}, {known}{changed}"]
        lines += [f"  {f.edit.name:<18} {f.state:<13} {f.edit.path}" for f in self.files]
        return "\n".join(lines)

    def require_usable(self, *, unlisted: bool, dirty: bool) -> None:
        """Raise LowbitError for a tree that only a flag makes us touch, or that no patch fits."""
        root = self.tree.root
        if self.dirty and not dirty:
            raise LowbitError(
                f"{self.dirty[0]} in {root} has changes of yours: commit or undo them, or pass "
                "--dirty"
            )
        if not self.release and not self.dirty and not unlisted:
            raise LowbitError(
                f"{root} (megatron-core {self.tree.version}) is not a release that "
                "patches/manifest.json lists: pass --unlisted to try, or add it by "
                "python -m megatron_lowbit patch make"
            )
        for file in self.files:
            path = root / file.edit.path
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
        return self._replace({f.edit: f.after for f in self.files if f.state == FITS})

    def revert(self) -> list[str]:
        """Take out the patches that are in; gives their names. On an error none is taken out."""
        return self._replace({f.edit: f.before for f in self.files if f.state == APPLIED})

    def _replace(self, texts: dict[Edit, str]) -> list[str]:
        tree = self.tree
        replace_together({tree.root / e.path: tree.encode(e.path, texts[e]) for e in texts})
        return [edit.name for edit in texts]


def _look_at(edit: Edit, text: str | None, manifest: Manifest) -> FileState:
    """An edit's file, with the first of its patch files that is in it, else the first that fits."""
    if text is None:
        return FileState(edit, ABSENT)
    for patch in manifest.of(edit.path):
        before = patch.take_out(text)
        if before is not None:
            return FileState(edit, APPLIED, patch, before, text)
    for patch in manifest.of(edit.path):
        after = patch.put_in(text)
        if after is not None:
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


def _is_dirty(tree: Tree, manifest: Manifest, file: FileState) -> bool:
    """Whether a file has changes that are neither upstream's, nor committed, nor the patch's."""
    committed = tree.committed(file.edit.path)
    if committed is not None:
        return committed not in (file.before, file.after)
    names = [name for name, one in manifest.releases.items() if one.version == tree.version]
    entries = [patch.files for patch in manifest.of(file.edit.path)]
    listed = {entry[name]["before"] for entry in entries for name in names if name in entry}
    return bool(listed) and sha256(file.before) not in listed
