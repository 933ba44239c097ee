"""Texts for calibration and evaluation: reading, tokenizing, cutting into sequences."""

import codecs
import hashlib
import itertools
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lowbit.calibration.pieces import Tokenize, tokenize_pieces
from megatron_lowbit.errors import CorpusError
from megatron_lowbit.json_files import check_regular, parse_json

_CHUNK = 1 << 16  # bytes that are read at once
# A text is poor with fewer different tokens, or if one of them is more than this share of all.
# 32,768 tokens of Emma have 3,629 different ones, and the most frequent is 6 % of them.
_FEWEST_DISTINCT = 32
_MOST_FREQUENT = 0.5


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


def read_corpus(paths: list[Path], tokenize: Tokenize) -> Corpus:
    """Read ``.txt`` files (a document each) and ``.jsonl`` files (``{"text": ...}`` a line).

    Files are read and tokenized in pieces (`calibration.pieces`): it takes little more memory than
    the tokens do.

    Raises:
        CorpusError: A file is missing, no regular file, empty, not UTF-8, of another kind, or a
            line is not valid; the message names the file and line.
    """
    digest = hashlib.sha256()
    tokens = array("q")
    for path in map(Path, paths):
        before = len(tokens)
        for document in _documents(path, _text(path, digest)):
            tokens.extend(tokenize_pieces(document, tokenize))
        if len(tokens) == before:
            raise CorpusError(f"{path} is empty: it has no text to use")
    names = [Path(path).name for path in paths]
    return Corpus(torch.frombuffer(tokens, dtype=torch.int64), digest.hexdigest(), names)


def poverty(sequences: Tensor) -> str | None:
    """In one line, why statistics over these tokens mean little; None if nothing says so.

    Args:
        sequences: Integer, any shape.
    """
    _, counts = sequences.unique(return_counts=True)
    share = counts.max().item() / sequences.numel()
    if len(counts) >= _FEWEST_DISTINCT and share <= _MOST_FREQUENT:
        return None
    return (
        f"the text is poor: {len(counts):,} different tokens in {sequences.numel():,}, the most "
        f"frequent is {share:.0%} of them"
    )


def _text(path: Path, digest) -> Iterator[str]:
    """The text of a file, chunk by chunk, without a byte order mark; its bytes go into `digest`."""
    if path.suffix not in (".txt", ".jsonl"):
        raise CorpusError(f'{path} is neither .txt nor .jsonl ({{"text": ...}} a line)')
    decoder, at_start, done = codecs.getincrementaldecoder("utf-8")(), True, 0
    try:
        check_regular(path, error=CorpusError)
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                digest.update(data)
                text = _decoded(decoder, data, path, done)
                yield text.removeprefix("\ufeff") if at_start else text
                at_start, done = at_start and not text, done + len(data)
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from None
    _decoded(decoder, b"", path, done)


def _decoded(decoder: codecs.IncrementalDecoder, data: bytes, path: Path, done: int) -> str:
    """The text of the next bytes, those after `done`; nothing left over where `data` is empty."""
    waiting = len(decoder.getstate()[0])
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 (byte {done - waiting + error.start})") from None


def _documents(path: Path, chunks: Iterator[str]) -> Iterator[Iterable[str]]:
    """The documents of a file, each as chunks of text."""
    if path.suffix == ".txt":
        first = next(filter(None, chunks), None)
        if first is not None:
            yield itertools.chain([first], chunks)
        return
    for number, line in enumerate(_lines(chunks), start=1):
        if line.strip():
            yield [_json_text(line, f"{path}, line {number}")]


def _lines(chunks: Iterator[str]) -> Iterator[str]:
    parts: list[str] = []
    for chunk in chunks:
        head, *rest = chunk.split("\n")
        parts.append(head)
        for line in rest:
            yield "".join(parts)
            parts = [line]
    yield "".join(parts)


def _json_text(line: str, where: str) -> str:
    value = parse_json(line, where, error=CorpusError)
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise CorpusError(f'{where} is not a JSON object with a "text"')
    return text
