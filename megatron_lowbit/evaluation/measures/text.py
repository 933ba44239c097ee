"""The text measure: how a codec changes the predictions of the next token, token by token.

A unit is a sequence; each token but its first is predicted from those before it. Differences in
negative log-likelihood and KL divergence are in nats a token, with standard errors over sequences.
"""

import math
from typing import Any

from torch import Tensor

from megatron_lowbit.evaluation.measures.measure import NATIVE, Record, Scores
from megatron_lowbit.evaluation.measures.uncertainty import mean, stderr
from megatron_lowbit.model import logits as lm
from megatron_lowbit.model.language_model import LanguageModel


class Text:
    """Perplexity, loss difference, KL divergence and top-1 agreement on one text.

    A record has sums over the sequence's tokens: natively ``tokens`` and ``nll``; for a variant
    ``nll``, ``kl`` and ``agree``, how many tokens have native's most likely next token.
    """

    unit = "sequence"

    def __init__(self, label: str, sequences: Tensor, *, sha256: str):
        """Measure on `sequences`, int64 ``[n, seq_length + 1]``, of a text called `label`."""
        self.name = f"text {label}"
        self._label, self._sequences = label, sequences
        tokens, length = sequences[:, 1:].numel(), sequences.shape[1] - 1
        self.identity: Any = {"sha256": sha256, "tokens": tokens, "seq_length": length}

    def __len__(self) -> int:
        return len(self._sequences)

    def run(self, number: int, model: LanguageModel, native: Any) -> tuple[Scores, Any]:
        """One sequence; `native` is the native run's log-probabilities and most likely tokens."""
        sequence = self._sequences[number]
        group = model.tp_group
        logits = model.logits(sequence[None, :-1])[0]
        log_probs = lm.log_softmax(logits, vocab_size=model.vocab_size, group=group)
        targets = sequence[1:].to(log_probs.device)
        nll = _sum(lm.negative_log_likelihood(log_probs, targets, group=group))
        best = lm.top1(log_probs, group=group)
        if native is None:
            return {"tokens": len(targets), "nll": nll}, (log_probs, best)
        native_log_probs, native_best = native
        kl = _sum(lm.kl_divergence(native_log_probs, log_probs, group=group))
        return {"nll": nll, "kl": kl, "agree": int((best == native_best).sum())}, None

    def summarize(self, records: list[Record]) -> dict:
        """Perplexities, and each variant's distance from native."""
        return {
            "name": self._label,
            **self.identity,
            "native": {"perplexity": math.exp(mean(_per_token(records, NATIVE, "nll")))},
            "results": [_result(records, name) for name in records[0] if name != NATIVE],
        }


def _result(records: list[Record], name: str) -> dict:
    nll, native = (_per_token(records, one, "nll") for one in (name, NATIVE))
    loss = [new - old for new, old in zip(nll, native, strict=True)]
    kl = _per_token(records, name, "kl")
    return {
        "variant": name,
        "perplexity": math.exp(mean(nll)),
        "delta_nll": mean(loss),
        "delta_nll_stderr": stderr(loss),
        "kl": mean(kl),
        "kl_stderr": stderr(kl),
        "top1": mean(_per_token(records, name, "agree")),
    }


def _per_token(records: list[Record], name: str, score: str) -> list[float]:
    """By sequence. All have as many tokens, so that the mean of these is the mean over tokens."""
    return [record[name][score] / record[NATIVE]["tokens"] for record in records]


def _sum(values: Tensor) -> float:
    return values.double().sum().item()
