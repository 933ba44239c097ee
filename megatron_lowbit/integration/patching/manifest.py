"""patches/manifest.json: which patch files there are, and the releases that each was seen to fit.

    {"format": 1,
     "releases": {"0.16.1": {"version": "0.16.1", "upstream": "commit ..."}, ...},
     "patches": [{"file": "arguments.patch", "sha256": ..., "touches": ..., "function": ...,
                  "purpose": ..., "removal": ..., "made_from": "0.19.2",
                  "applies_to": "0.13.1 to main",
                  "files": {"0.16.1": {"before": sha256, "after": sha256}, ...}}, ...]}

A release is known by its files' checksums. Versions do not tell: core_v0.19.0 calls itself 0.19.1.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.patching.diffs import Diff
from megatron_lowbit.json_files import read_json

NAME = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class Release:
    """Where a release's files come from.

    Attributes:
        version: What its package_info.py says, such as ``0.16.1``.
        upstream: A commit of NVIDIA/Megatron-LM, or a package.
    """

    version: str
    upstream: str


@dataclass
class Patch:
    """One patch file.

    Attributes:
        file: Its name.
        sha256: Of its bytes.
        touches: The file that it changes, in a tree.
        function: The function in it.
        purpose: What it is for.
        removal: When it is no longer needed.
        made_from: The release whose line numbers it has.
        applies_to: The range of `files`, in words.
        files: For each release the checksum of `touches` ``before`` and ``after``.
    """

    file: str
    touches: str
    function: str
    purpose: str
    removal: str
    made_from: str
    sha256: str = ""
    applies_to: str = ""
    files: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass
class Manifest:
    """What patches/ holds."""

    releases: dict[str, Release] = field(default_factory=dict)
    patches: list[Patch] = field(default_factory=list)

    def ordered(self, names: set[str]) -> list[str]:
        """Releases from the oldest to the newest."""
        return sorted(names, key=lambda name: (_numbers(self.releases[name].version), name))

    def range_of(self, patch: Patch) -> str:
        """The releases that a patch fits, in words."""
        names = self.ordered(set(patch.files))
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"

    def text(self) -> str:
        """The file's text."""
        releases = {name: asdict(self.releases[name]) for name in self.ordered({*self.releases})}
        patches = [
            {**asdict(patch), "files": {n: patch.files[n] for n in self.ordered({*patch.files})}}
            for patch in self.patches
        ]
        content = {"format": _FORMAT, "releases": releases, "patches": patches}
        return json.dumps(content, indent=2) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Read patches/manifest.json.

    Raises:
        LowbitError: There is none, or it is not one of ours.
    """
    path = directory / NAME
    if not path.exists():
        raise LowbitError(f"{directory} holds no {NAME}: name the folder of the patches")
    content = read_json(path, remedy="restore it, or run python -m megatron_lowbit patch make")
    try:
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}, this is for format {_FORMAT}")
        releases = {name: Release(**release) for name, release in content["releases"].items()}
        return Manifest(releases, [Patch(**patch) for patch in content["patches"]])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LowbitError(f"{path}: not a manifest of patches ({error})") from None


def read_diff(directory: Path, patch: Patch) -> Diff:
    """Read one patch file.

    Raises:
        LowbitError: It is missing, or not as it was made.
    """
    path = directory / patch.file
    try:
        raw = path.read_bytes().replace(b"\r\n", b"\n")  # as git may have checked it out
    except FileNotFoundError:
        raise LowbitError(f"{path} is missing: run python -m megatron_lowbit patch make") from None
    if sha256(raw) != patch.sha256:
        raise LowbitError(
            f"{path} was changed by hand: restore it, or run python -m megatron_lowbit patch make"
        )
    return Diff(raw.decode())


def sha256(raw: bytes) -> str:
    """Checksum, in hexadecimal."""
    return hashlib.sha256(raw).hexdigest()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
