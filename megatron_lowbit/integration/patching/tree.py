"""A Megatron on disk: a checkout, or a folder that pip installed or unpacked it into."""

import re
import subprocess
from pathlib import Path

from megatron_lowbit.errors import LowbitError

_VERSION_FILE = "megatron/core/package_info.py"


class Tree:
    """The folder that holds ``megatron/``. A file of it is named by its path in there."""

    def __init__(self, root: Path):
        """Look at a folder.

        Raises:
            LowbitError: It holds no Megatron.
        """
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

    def encode(self, path: str, text: str) -> bytes:
        """`text` as the bytes of a file, its lines ended as they are in it now."""
        is_crlf = _is_crlf((self.root / path).read_bytes())
        return text.replace("\n", "\r\n" if is_crlf else "\n").encode()

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


def plain(raw: bytes, errors: str = "strict") -> str:
    """A file's text; with plain newlines, where all its lines end as on Windows.

    git checks a file out so with core.autocrlf=true. Other carriage returns stay.
    """
    return (raw.replace(b"\r\n", b"\n") if _is_crlf(raw) else raw).decode(errors=errors)


def _is_crlf(raw: bytes) -> bool:
    """Whether every line ends in a carriage return and a newline, and no carriage return else."""
    count = raw.count(b"\r\n")
    return count > 0 and count == raw.count(b"\n") == raw.count(b"\r")
