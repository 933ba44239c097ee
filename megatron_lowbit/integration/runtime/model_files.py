"""What strangers wrote: JSON of a model's directory, tokenizers, and code that a model asks for.

Nothing of a model is ever run. transformers would run what `auto_map` names, and asks on stdin
whether it may unless it is told; a model that asks for it is refused before transformers sees it.
"""

from __future__ import annotations

import contextlib
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lowbit.errors import LowbitError

_LFS = b"version https://git-lfs"
_LARGEST = 2**28  # bytes of a JSON file; the largest tokenizer.json found has 2**25
# By these keys a model names code of its own: for its classes, and for transformers' pipelines.
_CODE_KEYS = ("auto_map", "custom_pipelines")
_CODE_FILES = ("config.json", "tokenizer_config.json", "generation_config.json")
_SHOWN = 300  # characters of another library's message


@contextlib.contextmanager
def one_line_errors(what: object, otherwise: str) -> Iterator[None]:
    """Turns whatever a library raises on a stranger's file into one line.

    Args:
        what: The file or directory, for the message.
        otherwise: What it is not, e.g. "not a model that transformers can read".

    Raises:
        LowbitError: The block raised; a missing package stays a ModuleNotFoundError.
    """
    try:
        yield
    except (LowbitError, ModuleNotFoundError):  # the latter is a package that is to be installed
        raise
    except MemoryError as error:
        raise LowbitError(f"{what}: {otherwise}: it asks for too much memory") from error
    except BaseException as error:
        # A panic of a library in Rust (tokenizers) is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:_SHOWN] or type(error).__name__
        raise LowbitError(f"{what}: {otherwise}: {reason}") from error


def check_file(path: Path) -> None:
    """Raises LowbitError unless `path` is a file with content, and not Git LFS's note of one."""
    if path.is_dir():
        raise LowbitError(f"{path}: a directory, expected a file")
    if not path.exists():
        raise LowbitError(f"{path}: no such file")
    if not path.is_file():  # a FIFO would be waited for
        raise LowbitError(f"{path}: not a regular file")
    if path.stat().st_size == 0:
        raise LowbitError(f"{path}: the file is empty: download it again")
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise LowbitError(
                f"{path}: only Git LFS's pointer to the file: fetch it with `git lfs pull`"
            )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        LowbitError: It is missing, no file, empty, a Git LFS pointer, too large, not UTF-8, not
            JSON, nested too deep, or no object.
    """
    check_file(path)
    if path.stat().st_size > _LARGEST:
        raise LowbitError(f"{path}: {path.stat().st_size} bytes, at most {_LARGEST} are read")
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LowbitError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise LowbitError(f"{path}: not JSON that can be read: nested too deep") from None
    except ValueError as error:
        raise LowbitError(f"{path}: not JSON, or only a part of it: {error}") from None
    if not isinstance(content, dict):
        raise LowbitError(f"{path}: expected a JSON object, found {reprlib.repr(content)}")
    return content


def refuse_own_code(directory: Path) -> None:
    """Raises LowbitError where a model or tokenizer in `directory` asks for code of its own."""
    for name in _CODE_FILES:
        path = directory / name
        content = read_json(path) if path.exists() else {}
        for key in _CODE_KEYS:
            if content.get(key):
                raise LowbitError(
                    f"{path}: {key}={reprlib.repr(content[key])} is not supported: it asks for "
                    "code of its own, and no code of a model is ever run"
                )


def last_token(tokenizer: Any) -> int:
    """The largest token that a transformers tokenizer gives for a text.

    Left out are special tokens, which only their own names in a text give: transformers adds some
    that a model does not know.
    """
    special = {token for token, what in tokenizer.added_tokens_decoder.items() if what.special}
    usual = set(tokenizer.get_vocab().values()) - special
    return max(*usual, *tokenizer.encode("a b"), tokenizer.eos_token_id or 0, -1)
