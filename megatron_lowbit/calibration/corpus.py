"""Texts for calibration and evaluation: reading, tokenizing, cutting into sequences."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lowbit.errors import CorpusError


@dataclass(frozen=True)
class Corpus:
    """A tokenized text.

    Attributes:
        tokens: int64 ``[n]``, all documents one after the other.
        sha256: Of the files' bytes.
        names: The files' names.
    """

    tokens: Tensor
    sha256: str
    names: list[str]

    def sample(self, sequences: int, seq_length: int, *, seed: int) -> Tensor:
        """Random, not overlapping sequences, in random order: int64 ``[sequences, seq_length]``.

        Raises:
            CorpusError: The corpus has fewer sequences of that length.
        """
        available = len(self.tokens) // seq_length
        self._require(sequences, seq_length, available)
        windows = self.tokens[: available * seq_length].view(available, seq_length)
        return windows[random.Random(seed).sample(range(available), sequences)]

    def first(self, sequences: int, seq_length: int) -> Tensor:
        """The first sequences in the text's order, each with the token after it.

        So each of ``sequences * seq_length`` tokens is predicted once: the result is int64
        ``[sequences, seq_length + 1]``, and a sequence's last token is the first of the next.

        Raises:
            CorpusError: The corpus is shorter.
        """
        self._require(sequences, seq_length, (len(self.tokens) - 1) // seq_length)
        return self.tokens[: sequences * seq_length + 1].unfold(0, seq_length + 1, seq_length)

    def _require(self, wanted: int, seq_length: int, available: int) -> None:
        if available < wanted:
            raise CorpusError(
                f"{', '.join(self.names)} is too short: {len(self.tokens)} tokens are {available} "
                f"sequences of {seq_length}, {wanted} were asked for; use a longer text or ask for "
                "fewer or shorter sequences"
            )


def read_corpus(paths: list[Path], tokenize: Callable[[str], list[int]]) -> Corpus:
    """Read ``.txt`` files (a document each) and ``.jsonl`` files (``{"text": ...}`` a line).

    Raises:
        CorpusError: A file is missing, empty, not UTF-8, of another kind, or a line is not valid;
            the message names the file and line.
    """
    digest = hashlib.sha256()
    tokens: list[int] = []
    for path in map(Path, paths):
        before = len(tokens)
        data = _read(path)
        digest.update(data)
        for document in _documents(path, data):
            tokens.extend(tokenize(document))
        if len(tokens) == before:
            raise CorpusError(f"{path} is empty: it has no text to use")
    names = [Path(path).name for path in paths]
    return Corpus(torch.tensor(tokens, dtype=torch.int64), digest.hexdigest(), names)


def _read(path: Path) -> bytes:
    if path.suffix not in (".txt", ".jsonl"):
        raise CorpusError(f'{path} is neither .txt nor .jsonl ({{"text": ...}} a line)')
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from None


def _documents(path: Path, data: bytes) -> Iterator[str]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 (byte {error.start})") from None
    if path.suffix == ".txt":
        yield text
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json_text(line, f"{path}, line {number}")


def _json_text(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise CorpusError(f'{where} is not a JSON object with a "text"')
    return text
