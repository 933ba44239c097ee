"""A Megatron on disk: a checkout, or a folder that pip installed or unpacked it into."""

import ast
import subprocess
from pathlib import Path
from typing import Any

from megatron_lowbit.errors import LowbitError

_VERSION_FILE = "megatron/core/package_info.py"


class Tree:
    """The folder that holds ``megatron/``."""

    def __init__(self, root: Path):
        """Look at a folder.

        Raises:
            LowbitError: It holds no Megatron.
        """
        self.root = root
        if not (root / _VERSION_FILE).is_file():
            raise LowbitError(
                f"{root} holds no {_VERSION_FILE}: name a Megatron-LM checkout, or the folder that "
                "pip show megatron-core calls its Location"
            )
        self.version = _version(root / _VERSION_FILE)

    def has(self, path: str) -> bool:
        """Whether there is such a file; megatron-core's packages before 0.17 lack some."""
        return (self.root / path).is_file()

    def read(self, path: str) -> str:
        """A file's text; with plain newlines, where all its lines end as on Windows.

        git checks a file out so with core.autocrlf=true. Other carriage returns stay.
        """
        try:
            text = (self.root / path).read_bytes().decode()
        except UnicodeDecodeError as error:
            raise LowbitError(f"{self.root / path} is not UTF-8 ({error})") from None
        return text.replace("\r\n", "\n") if _is_crlf(text) else text

    def encode(self, path: str, text: str) -> bytes:
        """`text` as the bytes of a file, its lines ended as they are in it now."""
        if _is_crlf((self.root / path).read_bytes().decode()):
            text = text.replace("\n", "\r\n")
        return text.encode()

    def committed(self, path: str) -> str | None:
        """A file's text in git's last commit; None where git does not know the file."""
        try:
            done = subprocess.run(
                ["git", "-C", str(self.root), "show", f"HEAD:./{path}"],
                capture_output=True,
                check=False,
            )
        except FileNotFoundError:  # no git
            return None
        if done.returncode != 0:
            return None
        text = done.stdout.decode(errors="replace")
        return text.replace("\r\n", "\n") if _is_crlf(text) else text

    def commit(self) -> str | None:
        """The commit that is checked out; None where git does not know these files."""
        if self.committed(_VERSION_FILE) is None:
            return None
        command = ["git", "-C", str(self.root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _is_crlf(text: str) -> bool:
    """Whether every line ends in a carriage return and a newline, and no carriage return else."""
    count = text.count("\r\n")
    return count > 0 and count == text.count("\n") == text.count("\r")


def _version(path: Path) -> str:
    """The release that package_info.py names: MAJOR.MINOR.PATCH."""
    try:
        body = ast.parse(path.read_bytes()).body
    except SyntaxError as error:
        raise LowbitError(f"{path} does not compile ({error.msg})") from None
    values: dict[str, Any] = {
        node.targets[0].id: node.value.value
        for node in body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    try:
        return ".".join(str(int(values[name])) for name in ("MAJOR", "MINOR", "PATCH"))
    except (KeyError, TypeError, ValueError):
        raise LowbitError(f"{path} names no version: not a Megatron we know") from None
