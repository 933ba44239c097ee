"""Loss and KL by position in long sequences: does an error grow with what came before?

Here the whole text is predicted; in `needles` single facts are looked up in it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.measures.measure import NATIVE, Record, Scores
from megatron_lowbit.evaluation.measures.uncertainty import mean, stderr
from megatron_lowbit.model import logits as lm
from megatron_lowbit.model.language_model import LanguageModel

FIRST_BUCKET = 512  # positions; each later bucket ends at twice the position
SLICE = 512  # positions scored at once: 8192 x 49152 logits in fp32 would be 1.6 GB


class LongText:
    """A `Measure` of long sequences; its scores are sums by bucket of positions, in nats.

    Position p is that of the last token seen: what is predicted is token p + 1.

    Args:
        sequences: int64 ``[n, seq_length + 1]``; all but each sequence's first are predicted.
        source: What the sequences are from, for the name: ``persuasion.txt``.
        sha256: Of the text.
    """

    unit = "sequence"

    def __init__(self, sequences: Tensor, *, source: str, sha256: str) -> None:
        count, width = sequences.shape
        self.name = f"long text {source}"
        self._source = source
        self.identity = {"sha256": sha256, "sequences": count, "seq_length": width - 1}
        self._sequences = sequences
        self.buckets = buckets(width - 1)

    def __len__(self) -> int:
        return len(self._sequences)

    def run(
        self, number: int, model: LanguageModel, native: Tensor | None
    ) -> tuple[Scores, Tensor]:
        """Score sequence `number`; `native` is the logits of the native run.

        Raises:
            LowbitError: The sequence is longer than the model's positions.
        """
        tokens = self._sequences[number]
        require_positions(len(tokens) - 1, model)
        logits = model.logits(tokens[None, :-1])[0]
        targets = tokens[1:].to(logits.device)
        return self._score(logits, targets, native, model), logits

    def _score(
        self, logits: Tensor, targets: Tensor, native: Tensor | None, model: LanguageModel
    ) -> Scores:
        sums = torch.zeros(2, len(self.buckets), dtype=torch.float64)
        for number, (first, end) in enumerate(self.buckets):
            for part in slices(first, end):
                own = log_probs(logits[part], model)
                nll = lm.negative_log_likelihood(own, targets[part], group=model.tp_group)
                sums[0, number] += nll.double().sum().cpu()
                if native is not None:
                    reference = log_probs(native[part], model)
                    kl = lm.kl_divergence(reference, own, group=model.tp_group)
                    sums[1, number] += kl.double().sum().cpu()
        nll, kl = sums.tolist()
        return {"nll": nll} if native is None else {"nll": nll, "kl": kl}

    def summarize(self, records: list[Record]) -> dict:
        """Nats a token, lists by bucket, with standard errors over sequences.

        Native: ``nll``. A variant: ``delta_nll``, the difference to native, and ``kl``.
        """
        native = self._per_token(records, NATIVE, "nll")
        results = []
        for variant in records[0]:
            if variant != NATIVE:
                loss = _difference(self._per_token(records, variant, "nll"), native)
                kl = self._per_token(records, variant, "kl")
                results.append({"variant": variant, **_means(delta_nll=loss, kl=kl)})
        return {
            "name": self._source,
            **self.identity,
            "buckets": [list(bucket) for bucket in self.buckets],
            "native": _means(nll=native),
            "results": results,
        }

    def _per_token(self, records: list[Record], variant: str, score: str) -> list[list[float]]:
        """``[bucket][sequence]`` of means over tokens."""
        return [
            [record[variant][score][number] / (end - first) for record in records]
            for number, (first, end) in enumerate(self.buckets)
        ]


def _means(**scores: list[list[float]]) -> dict:
    """Means over sequences of ``[bucket][sequence]``, and their standard errors."""
    means: dict[str, list] = {}
    for name, values in scores.items():
        means |= {name: [mean(bucket) for bucket in values]}
        means |= {f"{name}_stderr": [stderr(bucket) for bucket in values]}
    return means


def _difference(values: list[list[float]], native: list[list[float]]) -> list[list[float]]:
    return [
        [new - old for new, old in zip(row, native_row, strict=True)]
        for row, native_row in zip(values, native, strict=True)
    ]


def buckets(length: int) -> list[tuple[int, int]]:
    """``[first, end)`` of positions: 0-512, 512-1024, 1024-2048, ... up to `length`."""
    edges = [0]
    end = FIRST_BUCKET
    while edges[-1] < length:
        edges.append(min(end, length))
        end *= 2
    return list(zip(edges, edges[1:], strict=False))


def slices(first: int, end: int) -> Iterator[slice]:
    """Positions `first` to `end`, at most `SLICE` at a time."""
    for start in range(first, end, SLICE):
        yield slice(start, min(start + SLICE, end))


def log_probs(logits: Tensor, model: LanguageModel) -> Tensor:
    """fp32 log-probabilities of `logits` ``[tokens, part]``."""
    return lm.log_softmax(logits, vocab_size=model.vocab_size, group=model.tp_group)


def require_positions(length: int, model: LanguageModel) -> None:
    """Raise `LowbitError` if a sequence of `length` tokens is too long for `model`."""
    if length > model.max_length:
        raise LowbitError(
            f"a sequence of {length} tokens does not fit the model's {model.max_length} positions: "
            "ask for shorter ones"
        )
