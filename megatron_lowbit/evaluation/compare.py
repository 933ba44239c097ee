"""Compare variants of one model with its native BF16 communication, token by token.

Each sequence runs natively first and then through every variant, so that nothing but sums is kept.
The loop knows nothing of Megatron: a `Variant` says how to switch itself on and off.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.comm.traffic import Counters, Traffic
from megatron_lowbit.evaluation import language_model as lm

_NLL, _BASE_NLL, _KL, _AGREE, _COUNT = range(5)


@dataclass(frozen=True)
class Variant:
    """A way to communicate.

    Attributes:
        name: As in the results.
        active: Makes a context in which the model communicates this way.
        traffic: The counters of its sync points.
    """

    name: str
    active: Callable[[], AbstractContextManager]
    traffic: list[Traffic]


def compare(
    sequences: Tensor,
    logits: Callable[[Tensor], Tensor],
    variants: list[Variant],
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    dp_group: dist.ProcessGroup | None,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[dict, list[dict]]:
    """Score every variant against native communication.

    Args:
        sequences: int64 ``[n, seq_length + 1]``; all but each sequence's first are predicted.
        logits: Runs int64 ``[seq_length]`` through the model, gives ``[seq_length, part]``.
        variants: What to compare.
        vocab_size: Without padding.
        tp_group: The ranks that share a sequence.
        dp_group: The ranks that share the sequences.
        track: Wraps the loop, for a progress bar.

    Returns:
        The native result (``tokens``, ``perplexity``), and a result per variant (`_result`).
    """
    sums = []
    mine = range(dist.get_rank(dp_group), len(sequences), dist.get_world_size(dp_group))
    for number in track(mine):
        sequence = sequences[number]
        base = _log_probs(logits, sequence, vocab_size, tp_group)
        base_nll = lm.negative_log_likelihood(base, sequence[1:].to(base.device), group=tp_group)
        base_top = lm.top1(base, group=tp_group)
        scores = []
        for variant in variants:
            with variant.active():
                other = _log_probs(logits, sequence, vocab_size, tp_group)
            nll = lm.negative_log_likelihood(other, sequence[1:].to(base.device), group=tp_group)
            kl = lm.kl_divergence(base, other, group=tp_group)
            agree = lm.top1(other, group=tp_group) == base_top
            columns = (nll, base_nll, kl, agree, torch.ones_like(nll))
            scores.append(torch.stack([column.double().sum() for column in columns]))
        sums.append(torch.stack(scores).cpu())
    per_sequence, totals = _merge(sums, [_totals(v.traffic) for v in variants], dp_group)
    native = per_sequence[:, 0].sum(dim=0)
    summary = {
        "tokens": int(native[_COUNT]),
        "perplexity": math.exp(native[_BASE_NLL] / native[_COUNT]),
    }
    rows = zip(variants, per_sequence.unbind(dim=1), totals, strict=True)
    return summary, [_result(variant.name, scores, total) for variant, scores, total in rows]


def _log_probs(logits, sequence: Tensor, vocab_size: int, tp_group) -> Tensor:
    return lm.log_softmax(logits(sequence[:-1]), vocab_size=vocab_size, group=tp_group)


def _totals(traffic: list[Traffic]) -> Counters:
    """The sum over sync points, of which each sees every token."""
    total = Counters()
    for one in traffic:
        total.add(one.total())
    total.tokens = traffic[0].total().tokens
    return total


def _merge(
    sums: list[Tensor], totals: list[Counters], dp_group: dist.ProcessGroup | None
) -> tuple[Tensor, list[Counters]]:
    """Of all data-parallel ranks: fp64 ``[sequences, variants, 5]``, and the variants' traffic."""
    parts = [None] * dist.get_world_size(dp_group)
    dist.all_gather_object(parts, (sums, totals), group=dp_group)
    merged = [Counters() for _ in totals]
    for _, of_rank in parts:
        for total, one in zip(merged, of_rank, strict=True):
            total.add(one)
    return torch.stack([score for scores, _ in parts for score in scores]), merged


def _result(name: str, scores: Tensor, traffic: Counters) -> dict:
    """A variant's row of results from its fp64 ``[sequences, 5]`` sums.

    ``delta_nll`` and ``kl`` are nats a token, with the standard error over sequences; ``top1`` is
    the share of tokens whose most likely next token is native's; ``wire_bytes_per_token`` is what
    one rank sends for one token through all sync points.
    """
    total = scores.sum(dim=0)
    tokens = total[_COUNT].item()
    delta = (scores[:, _NLL] - scores[:, _BASE_NLL]) / scores[:, _COUNT]
    kl = scores[:, _KL] / scores[:, _COUNT]
    return {
        "codec": name,
        "bits_per_value": traffic.bits_per_value,
        "perplexity": math.exp(total[_NLL] / tokens),
        "delta_nll": ((total[_NLL] - total[_BASE_NLL]) / tokens).item(),
        "delta_nll_stderr": _standard_error(delta),
        "kl": (total[_KL] / tokens).item(),
        "kl_stderr": _standard_error(kl),
        "top1": (total[_AGREE] / tokens).item(),
        "wire_bytes_per_token": traffic.sent_bytes / traffic.tokens,
    }


def _standard_error(values: Tensor) -> float | None:
    """Of the mean over sequences; None for a single one."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
