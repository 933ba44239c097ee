"""What tools/patchctl.py does to a Megatron: check, apply, revert, status.

A patch file either is in its file, or fits it, or neither; that is seen from the text, so a fork
that carries the patches in a commit is understood, too. Taking a patch out again in thought gives
the file as it was, and its checksum tells the release. Everything is worked out and checked before
the first file is written, and the files are replaced together.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import replace_together
from megatron_lowbit.integration.patching.diffs import MisfitError
from megatron_lowbit.integration.patching.edits import EDITS
from megatron_lowbit.integration.patching.manifest import (
    Manifest,
    Patch,
    read_diff,
    read_manifest,
    sha256,
)
from megatron_lowbit.integration.patching.tree import Tree

APPLIED, FITS, MISFIT, ABSENT = "applied", "not applied", "does not fit", "no such file"


@dataclass(frozen=True)
class FileState:
    """A file that a purpose's patch touches.

    Attributes:
        name: The purpose: the patch file's name without its ending or release.
        path: Of the file, in the tree.
        state: One of APPLIED, FITS, MISFIT and ABSENT.
        patch: The patch file that is in it or fits it.
        before: The text without the patch; what is there, if none fits.
        after: The text with it.
    """

    name: str
    path: str
    state: str
    patch: Patch | None = None
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class State:
    """A tree as the patches see it.

    Attributes:
        tree: The tree.
        files: For each purpose what its file is like.
        release: The release that all files are of, patches taken out; None for an unlisted one.
        dirty: Files that differ from that, or in a git checkout from its last commit, by more than
            the patches.
    """

    tree: Tree
    files: list[FileState]
    release: str | None
    dirty: list[str]

    def __str__(self) -> str:
        known = f"the files of {self.release}" if self.release else "not a listed release"
        changed = "".join(f"; {path} has changes of yours" for path in self.dirty)
        lines = [f"{self.tree.root}: megatron-core {self.tree.version}, {known}{changed}"]
        lines += [f"  {file.name:<18} {file.state:<13} {file.path}" for file in self.files]
        return "\n".join(lines)


def look(root: Path, patches: Path) -> State:
    """See what the patches are to a Megatron.

    Args:
        root: The folder that holds ``megatron/``.
        patches: The folder of the patch files.

    Raises:
        LowbitError: No Megatron, or no patches.
    """
    tree, manifest = Tree(root), read_manifest(patches)
    files = [_file_state(tree, manifest, patches, edit.name, edit.path) for edit in EDITS]
    if all(file.state == ABSENT for file in files):
        raise LowbitError(f"{root} has none of the files that the patches change: no Megatron")
    release = _release(manifest, files)
    dirty = [] if release else [f.path for f in files if _is_dirty(tree, manifest, f)]
    return State(tree, files, release, dirty)


def require_usable(state: State, *, unlisted: bool, dirty: bool) -> None:
    """Raise LowbitError for a tree that only a flag makes us touch, or that no patch fits.

    Args:
        state: From `look`.
        unlisted: Whether the user allows a release that the manifest does not list.
        dirty: Whether the user allows files with uncommitted changes.
    """
    root, version = state.tree.root, state.tree.version
    if state.dirty and not dirty:
        raise LowbitError(
            f"{state.dirty[0]} in {root} has changes of yours: commit or undo them, or pass --dirty"
        )
    if not state.release and not state.dirty and not unlisted:
        raise LowbitError(
            f"{root} (megatron-core {version}) is not a release that patches/manifest.json lists: "
            "pass --unlisted to try, or add it by python -m megatron_lowbit patch make"
        )
    for file in state.files:
        if file.state == MISFIT and "\r\n" in file.before:
            raise LowbitError(
                f"{root / file.path}: some of its lines end as on Windows and others do not, and "
                "no patch fits: end all alike"
            )
        if file.state == MISFIT:
            raise LowbitError(
                f"{file.name}.patch does not fit {root / file.path}: make one for this release by "
                "python -m megatron_lowbit patch make"
            )


def apply(state: State) -> list[str]:
    """Put in the patches that are not in; gives their names. All of them or, on an error, none."""
    return _change([file for file in state.files if file.state == FITS], state.tree, "after")


def revert(state: State) -> list[str]:
    """Take out the patches that are in; gives their names. All of them or, on an error, none."""
    return _change([file for file in state.files if file.state == APPLIED], state.tree, "before")


def _change(files: Iterable[FileState], tree: Tree, which: str) -> list[str]:
    files = list(files)
    contents = {f.path: tree.encode(f.path, getattr(f, which)) for f in files}
    replace_together({tree.root / path: raw for path, raw in contents.items()})
    return [file.name for file in files]


def _file_state(tree: Tree, manifest: Manifest, patches: Path, name: str, path: str) -> FileState:
    """The first patch file of a purpose that is in the file, else the first that fits."""
    if not tree.has(path):
        return FileState(name, path, ABSENT)
    text = tree.read(path)
    candidates = [(p, read_diff(patches, p)) for p in manifest.patches if p.touches == path]
    for patch, diff in candidates:
        try:
            return FileState(name, path, APPLIED, patch, diff.revert(text), text)
        except MisfitError:
            continue
    (edit,) = [edit for edit in EDITS if edit.name == name]
    for patch, diff in candidates:
        try:
            applied = diff.apply(text)
        except MisfitError:
            continue
        edit.check_place(applied.text, applied.added)
        return FileState(name, path, FITS, patch, text, applied.text)
    return FileState(name, path, MISFIT, None, text, text)


def _release(manifest: Manifest, files: list[FileState]) -> str | None:
    """The newest release that every file is of, unpatched or exactly as the manifest has it."""
    found = set(manifest.releases)
    for file in files:
        if file.state == ABSENT:
            continue
        sums = {"before": _sum(file.before), "after": _sum(file.after)}
        listed = file.patch.files if file.patch else {}
        found &= {name for name, entry in listed.items() if entry == sums}
    names = manifest.ordered(found)
    return names[-1] if names else None


def _is_dirty(tree: Tree, manifest: Manifest, file: FileState) -> bool:
    """Whether a file has changes that are neither upstream's, nor committed, nor the patch's."""
    if file.state == ABSENT:
        return False
    committed = tree.committed(file.path)
    if committed is not None:
        return committed not in (file.before, file.after)
    entries = [patch.files for patch in manifest.patches if patch.touches == file.path]
    version = [
        name for name, release in manifest.releases.items() if release.version == tree.version
    ]
    listed = {entry[name]["before"] for entry in entries for name in version if name in entry}
    return bool(listed) and _sum(file.before) not in listed


def _sum(text: str) -> str:
    return sha256(text.encode())
