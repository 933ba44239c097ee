"""The one reader of JSON that comes from files: what is wrong with one is a line with its path.

A file may be a stranger's, cut off, or not a file at all. Refused are: a directory, a FIFO or a
device (before it is opened: it would hang or never end), a file that is too large, text that is
not UTF-8, a key that an object has twice, NaN and Infinity, integers beyond 64 bits, numbers beyond
a double, lone surrogates (they cannot be printed or written again) and values nested too deep to be
handled. A byte order mark is left out.
"""

import hashlib
import json
import math
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megatron_lowbit.errors import LowbitError

LARGEST = 1 << 24  # bytes; a list of empty lists takes 430 MB in memory
_DEPTH = 64  # levels; what we write has about ten
_INTEGERS = 1 << 63
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_SHOWN = 60  # characters of a bad value in a message

Constant = Callable[[str], Any]


def read_json(
    path: Path,
    *,
    constant: Constant | None = None,
    error: type[LowbitError] = LowbitError,
    remedy: str = "",
) -> Any:
    """Read a JSON file.

    Args:
        path: Of a regular file.
        constant: What NaN, Infinity and -Infinity are to be; refused if left out.
        error: What is raised.
        remedy: What to do about it, at the end of the message.

    Raises:
        LowbitError: It cannot be read, or it is no JSON as described above.
    """
    data = read_regular(path, largest=LARGEST, error=error, remedy=remedy)
    return parse_json(data, str(path), constant=constant, error=error, remedy=remedy)


def read_regular(
    path: Path, *, largest: int, error: type[LowbitError] = LowbitError, remedy: str = ""
) -> bytes:
    """The bytes of a regular file of at most `largest` bytes.

    Raises:
        LowbitError: It is missing, not a regular file, larger, or cannot be read.
    """
    behind = f"; {remedy}" if remedy else ""
    try:
        check_regular(path, error=error, remedy=remedy)
        with Path(path).open("rb") as file:
            data = file.read(largest + 1)
    except (OSError, ValueError) as failure:
        if isinstance(failure, LowbitError):
            raise
        raise error(f"cannot read {path}: {_reason(failure)}{behind}") from None
    if len(data) > largest:
        raise error(f"{path} has more than {largest:,} bytes, too many for what it is{behind}")
    return data


def check_regular(path: Path, *, error: type[LowbitError] = LowbitError, remedy: str = "") -> None:
    """Raise unless `path` is a regular file or a link to one; it is not opened.

    Raises:
        LowbitError: It is a directory, a FIFO, a device or a socket.
        OSError: There is nothing, or nothing that may be looked at.
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise error(f"{path} is not a regular file" + (f": {remedy}" if remedy else ""))


def parse_json(
    data: bytes | str,
    where: str,
    *,
    constant: Constant | None = None,
    error: type[LowbitError] = LowbitError,
    remedy: str = "",
) -> Any:
    """The value of a JSON text, of a file or of one of its lines.

    Args:
        data: The text, or its bytes.
        where: The file's path, and the line, for messages.
        constant: See `read_json`.
        error: What is raised.
        remedy: See `read_json`.

    Raises:
        LowbitError: See the module.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=constant or _no_constant,
        )
        _check(value, bool(_SURROGATE.search(text)))
    except UnicodeDecodeError as failure:
        problem = f"it is not UTF-8: byte {failure.start}"
    except RecursionError:
        problem = f"it is nested deeper than {_DEPTH} levels"
    except ValueError as failure:
        problem = str(failure)
    else:
        return value
    raise error(f"{where} is not valid JSON ({problem})" + (f": {remedy}" if remedy else ""))


def shown(value: object) -> str:
    """A bad value for a message: in one line, and not all of it if it is long."""
    text = repr(value) if not isinstance(value, int) or abs(value) < _INTEGERS else "a huge integer"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {shown(twice)} twice")
    return made


def _integer(text: str) -> int:
    if len(text) > 20 or not -_INTEGERS <= (value := int(text)) < _INTEGERS:
        raise ValueError(f"an integer of {len(text.lstrip('-'))} digits is beyond 64 bits")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:_SHOWN]} is beyond a double")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def digest(content: dict[str, Any]) -> str:
    """sha256 of a JSON object in canonical form, without the digest of its own under ``sha256``."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check(value: Any, surrogates: bool) -> None:
    """Raise ValueError for what is nested too deep or, where some may be, for lone surrogates."""
    level = [value]
    for _ in range(_DEPTH):
        inside: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inside += one.values()
                inside += one if surrogates else ()
            elif isinstance(one, list):
                inside += one
            elif surrogates and isinstance(one, str):
                _check_text(one)
        level = inside
        if not level:
            return
    raise RecursionError


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the text {shown(text)} has a lone surrogate") from None


def _reason(failure: Exception) -> str:
    return getattr(failure, "strerror", None) or str(failure)
