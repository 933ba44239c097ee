"""What tools/evaluate.py measures: from its options to measures, before a model is loaded.

Only the error at sync points is left for later (`integration.loops.evaluate_checkpoint`): it needs
the model's.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.calibration.corpus import Corpus, read_corpus
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.measures.generation import Generation
from megatron_lowbit.evaluation.measures.long_context import LongText
from megatron_lowbit.evaluation.measures.measure import Measure
from megatron_lowbit.evaluation.measures.needles import Needles
from megatron_lowbit.evaluation.measures.task_data import TASKS, read_task
from megatron_lowbit.evaluation.measures.tasks import Task
from megatron_lowbit.evaluation.measures.text import Text

# As many of each, where the text has them; five needles a text.
_LONG_SEQUENCES = 2
_NEEDLE_TEXTS = 4
_PROMPTS, _PROMPT_LENGTH = 16, 64
_SEED = 1234  # of the texts for needles and of the prompts

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Inputs:
    """What an evaluation reads, besides the index.

    Attributes:
        tokenizer: Megatron's, without special tokens.
        prefix: Tokens that it would put before every text with them.
        texts: What a text is called -> its tokens, with special tokens if the tokenizer has them.
        measures: Key of the JSON output -> its measures, in the order in which they are to run.
    """

    tokenizer: object
    prefix: list[int]
    texts: dict[str, Corpus]
    measures: dict[str, list[Measure]]


def check_options(options: argparse.Namespace) -> None:
    """Raise `LowbitError` for options that are wrong by themselves."""
    text_labels(options.data)
    task_names(options.tasks)
    if options.limit and not options.tasks:
        raise LowbitError("--limit is of items of tasks: name some with --tasks")
    for flag, value in (("--long-context", options.long_context), ("--generate", options.generate)):
        if value and not options.data:
            raise LowbitError(f"{flag} {value} needs a text: name one with --data")
    if not options.data and not options.tasks:
        raise LowbitError("nothing to measure: name a text with --data, or tasks with --tasks")


def task_names(text: str | None) -> list[str]:
    """The tasks of ``--tasks``: names with commas, or ``all``.

    Raises:
        LowbitError: One is not known.
    """
    if text in (None, "all"):
        return TASKS if text else []
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in TASKS:
            raise LowbitError(f"--tasks: unknown task {name!r}; known: {', '.join(TASKS)}, or all")
    return names


def text_labels(paths: list[Path]) -> list[str]:
    """What the texts are called in the results: their files' names, or paths to tell them apart.

    Raises:
        LowbitError: A file is there twice.
    """
    for labels in ([path.name for path in paths], [str(path) for path in paths]):
        if len(set(labels)) == len(labels):
            return labels
    raise LowbitError(f"--data {' '.join(labels)}: a file is named twice")


def read_inputs(
    options: argparse.Namespace, positions: int, *, tokenize: Tokenize, tokenizer: Any
) -> Inputs:
    """Read texts and tasks.

    Args:
        options: Of tools/evaluate.py.
        positions: That the model has.
        tokenize: Text to tokens, with the tokenizer's special tokens.
        tokenizer: The same tokenizer without them, as Megatron has it.

    Raises:
        LowbitError: A sequence is longer than the model's positions, a text is too short, missing
            or not valid, or the tasks' package is.
    """
    check_lengths(options, positions)
    prefix = prefix_of(tokenize, tokenizer.tokenize)
    texts = {
        label: read_corpus([path], tokenize)
        for label, path in zip(text_labels(options.data), options.data, strict=True)
    }
    measures: dict[str, list[Measure]] = {
        "texts": [
            Text(label, text_sequences(corpus, options), sha256=corpus.sha256)
            for label, corpus in texts.items()
        ],
        "tasks": [Task(read_task(name, limit=options.limit)) for name in task_names(options.tasks)],
        "long_context": [],
        "generation": [],
    }
    if options.long_context or options.generate:
        source = next(iter(texts))
        plain = read_corpus(options.data[:1], tokenizer.tokenize)
        if options.long_context:
            measures["long_context"] = long_context(
                plain, options.long_context, source, tokenize=tokenizer.tokenize, prefix=prefix
            )
        if options.generate:
            measures["generation"] = [generation(plain, options.generate, source, prefix=prefix)]
    return Inputs(tokenizer, prefix, texts, measures)


def check_lengths(options: argparse.Namespace, positions: int) -> None:
    """Raise `LowbitError` if a sequence is longer than the model's `positions`."""
    lengths = {f"--seq-length {options.seq_length}": options.seq_length} if options.data else {}
    if options.long_context:
        lengths[f"--long-context {options.long_context}"] = options.long_context
    if options.generate:
        what = f"--generate {options.generate} after prompts of {_PROMPT_LENGTH}"
        lengths[what] = _PROMPT_LENGTH + options.generate - 1
    for what, length in lengths.items():
        if length > positions:
            raise LowbitError(f"{what}: the model has {positions} positions")


def prefix_of(tokenize: Tokenize, plain: Tokenize) -> list[int]:
    """What `tokenize` puts before every text and `plain`, the same tokenizer, does not."""
    whole, bare = tokenize("a"), plain("a")
    places = range(len(whole) - len(bare) + 1)
    return next((whole[:n] for n in places if whole[n : n + len(bare)] == bare), [])


def text_sequences(corpus: Corpus, options: argparse.Namespace) -> Tensor:
    """int64 ``[n, seq_length + 1]``: the start of a text."""
    return corpus.first(-(-options.tokens // options.seq_length), options.seq_length)


def long_context(
    corpus: Corpus, length: int, source: str, *, tokenize: Tokenize, prefix: list[int]
) -> list[Measure]:
    """A long text, and needles in texts as long, both of `corpus`, which has no special tokens.

    Raises:
        LowbitError: `corpus` has no sequence of that length, or it is too short for needles.
    """
    own = length - len(prefix)
    available = max(1, (len(corpus.tokens) - 1) // max(own, 1))  # of none, `corpus` will complain
    sequences = corpus.first(min(_LONG_SEQUENCES, available), own)
    texts = corpus.sample(min(_NEEDLE_TEXTS, available), own, seed=_SEED)
    origin = {"source": source, "sha256": corpus.sha256}
    return [
        LongText(with_prefix(prefix, sequences), **origin),
        Needles(with_prefix(prefix, texts), tokenize=tokenize, **origin),
    ]


def generation(corpus: Corpus, new_tokens: int, source: str, *, prefix: list[int]) -> Generation:
    """Generation from prompts out of `corpus`, which has no special tokens.

    Raises:
        LowbitError: `corpus` is too short.
    """
    prompts = corpus.sample(_PROMPTS, _PROMPT_LENGTH - len(prefix), seed=_SEED)
    return Generation(
        with_prefix(prefix, prompts), new_tokens=new_tokens, source=source, sha256=corpus.sha256
    )


def with_prefix(prefix: list[int], sequences: Tensor) -> Tensor:
    """int64 ``[n, length]`` -> ``[n, prefix + length]``."""
    first = torch.tensor(prefix, dtype=sequences.dtype).expand(len(sequences), len(prefix))
    return torch.cat([first, sequences], dim=1)
