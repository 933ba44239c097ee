"""The text measure: how a codec changes the predictions of the next token, token by token.

A unit is a sequence; each token but its first is predicted from those before it. Differences in
negative log-likelihood and KL divergence are in nats a token, with standard errors over sequences.
"""

import math
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.evaluation.measures.measure import NATIVE, Record, Scores
from megatron_lowbit.model import logits as lm
from megatron_lowbit.model.language_model import LanguageModel


class Text:
    """Perplexity, loss difference, KL divergence and top-1 agreement on one text.

    A record has sums over the sequence's tokens: natively ``tokens`` and ``nll``; for a variant
    ``nll``, ``kl`` and ``agree``, how many tokens have native's most likely next token.
    """

    unit = "sequence"

    def __init__(self, label: str, sequences: Tensor, *, sha256: str):
        """Measure on `sequences`.

        Args:
            label: What the text is called in the results.
            sequences: int64 ``[n, seq_length + 1]``.
            sha256: Of the text.
        """
        self.name = f"text {label}"
        self._label, self._sequences = label, sequences
        tokens, seq_length = sequences[:, 1:].numel(), sequences.shape[1] - 1
        self.identity: dict[str, Any] = {
            "sha256": sha256,
            "tokens": tokens,
            "seq_length": seq_length,
        }

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
        tokens = torch.tensor([r[NATIVE]["tokens"] for r in records], dtype=torch.float64)
        native_nll = _column(records, NATIVE, "nll")
        variants = [name for name in records[0] if name != NATIVE]
        return {
            "name": self._label,
            **self.identity,
            "native": {"perplexity": _perplexity(native_nll, tokens)},
            "results": [_result(records, name, native_nll, tokens) for name in variants],
        }


def _result(records: list[Record], name: str, native_nll: Tensor, tokens: Tensor) -> dict:
    nll, kl = _column(records, name, "nll"), _column(records, name, "kl")
    total = tokens.sum()
    return {
        "variant": name,
        "perplexity": _perplexity(nll, tokens),
        "delta_nll": ((nll - native_nll).sum() / total).item(),
        "delta_nll_stderr": _standard_error((nll - native_nll) / tokens),
        "kl": (kl.sum() / total).item(),
        "kl_stderr": _standard_error(kl / tokens),
        "top1": (_column(records, name, "agree").sum() / total).item(),
    }


def _column(records: list[Record], name: str, key: str) -> Tensor:
    """fp64 ``[sequences]``."""
    return torch.tensor([record[name][key] for record in records], dtype=torch.float64)


def _perplexity(nll: Tensor, tokens: Tensor) -> float:
    return math.exp(nll.sum() / tokens.sum())


def _standard_error(values: Tensor) -> float | None:
    """Of the mean over sequences; None for a single one."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None


def _sum(values: Tensor) -> float:
    return values.double().sum().item()
