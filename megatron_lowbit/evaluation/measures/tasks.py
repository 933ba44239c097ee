"""Zero-shot tasks, scored by likelihood as EleutherAI's lm-evaluation-harness does.

The rules are read off lm-evaluation-harness at commit 4e7e0d4 (August 2026): `_encode_pair` and
`loglikelihood` in lm_eval/api/model.py, `_loglikelihood_tokens` in lm_eval/models/huggingface.py,
`process_results` in lm_eval/api/task.py. Two things differ. Log-probabilities are taken in fp32,
where the harness by default takes them in the dtype of the logits. An item with a log-likelihood
that is NaN counts as wrong, where numpy's argmax would choose the NaN.

A unit is one item, all its choices in one batch. On a CPU larger batches gain nothing: SmolLM2-135M
in bfloat16 on one core ran 4 x 32 tokens at 574 tokens a second and 16 x 32 at 605, 2 x 180 at 572
and 16 x 180 at 601.
"""

import math

import torch
from torch import Tensor

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.measures.measure import NATIVE, Record, Scores
from megatron_lowbit.evaluation.measures.task_data import SEED, Item, TaskData
from megatron_lowbit.evaluation.measures.uncertainty import interval_95, mean, ratio_stderr, stderr
from megatron_lowbit.model import logits as lm
from megatron_lowbit.model.language_model import LanguageModel

Request = tuple[list[int], list[int]]  # tokens of a context and of its continuation

_METRICS = ("acc", "acc_norm")


class Task:
    """A `Measure` of one task; its scores are the log-likelihoods of an item's choices, in nats."""

    unit = "item"

    def __init__(self, data: TaskData) -> None:
        self.name = f"task {data.name}"
        self.identity = {"sha256": data.sha256, "items": len(data.items), "seed": SEED}
        self._data = data
        self._tokenized: tuple[int, list[Request]] | None = None  # the latest item's

    def __len__(self) -> int:
        return len(self._data.items)

    def run(self, number: int, model: LanguageModel, native: None) -> tuple[Scores, None]:
        """Score the choices of item `number`; nothing of the native run is needed."""
        if self._tokenized is None or self._tokenized[0] != number:
            self._tokenized = number, tokenize_item(self._data.items[number], model)
        return {"log_likelihoods": log_likelihoods(self._tokenized[1], model)}, None

    def summarize(self, records: list[Record]) -> dict:
        """Accuracies, each with its standard error over items.

        ``acc`` is the share of items whose right choice is the likeliest, ``acc_norm`` the same by
        log-likelihood per character. ``metric`` says which of them the task is judged by. For a
        variant ``difference`` is that metric less native's, with the error of the paired
        difference; ``kept`` its share of native's; ``same_choice`` the share of items where it
        chooses as native does, right or wrong.
        """
        chosen = {variant: self._chosen(records, variant) for variant in records[0]}
        native = self._accuracies(chosen[NATIVE])
        return {
            "name": self._data.name,
            "items": len(records),
            "metric": self._data.metric,
            "native": native,
            "results": [
                {"variant": variant, **self._result(chosen[variant], chosen[NATIVE], native)}
                for variant in chosen
                if variant != NATIVE
            ],
        }

    def _chosen(self, records: list[Record], variant: str) -> dict[str, list[int]]:
        """By metric, the choice for each item."""
        pairs = list(zip(self._data.items, records, strict=True))
        return {
            name: [choose(r[variant]["log_likelihoods"], item, metric=name) for item, r in pairs]
            for name in _METRICS
        }

    def _correct(self, chosen: list[int]) -> list[int]:
        return [int(one == item.gold) for one, item in zip(chosen, self._data.items, strict=True)]

    def _accuracies(self, chosen: dict[str, list[int]]) -> dict:
        row: dict[str, float | None] = {}
        for name in _METRICS:
            correct = self._correct(chosen[name])
            row |= {name: mean(correct), f"{name}_stderr": stderr(correct)}
        return row

    def _result(self, chosen: dict, native_chosen: dict, native: dict) -> dict:
        metric = self._data.metric
        pairs = list(zip(chosen[metric], native_chosen[metric], strict=True))
        before = self._correct(native_chosen[metric])
        after = self._correct(chosen[metric])
        differences = [new - old for new, old in zip(after, before, strict=True)]
        return {
            **self._accuracies(chosen),
            "kept": mean(after) / native[metric] if native[metric] else None,
            "difference": mean(differences),
            "difference_stderr": stderr(differences),
            "same_choice": mean([int(one == other) for one, other in pairs]),
        }


def tokenize_item(item: Item, model: LanguageModel) -> list[Request]:
    """Tokens of an item's choices; the model's prefix comes before each context."""
    requests = []
    for context, text in zip(item.contexts, item.continuations, strict=True):
        before, scored = encode_pair(context, text, model.tokenize)
        requests.append(([*model.prefix, *before], scored))
    return requests


def encode_pair(context: str, continuation: str, tokenize) -> Request:
    """Split the tokens of ``context + continuation`` where the context's own tokens end.

    Spaces that the context ends with go to the continuation.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    whole = tokenize(kept + continuation)
    start = len(tokenize(kept))
    return whole[:start], whole[start:]


def log_likelihoods(requests: list[Request], model: LanguageModel) -> list[float]:
    """Log-likelihood of each continuation given its context, in nats.

    All of them run in one batch, padded on the right; equal inputs (continuations that differ in
    their last token only) run once. What exceeds ``max_length + 1`` tokens is cut on the left.

    Raises:
        LowbitError: A continuation alone is longer than the model's `max_length`.
    """
    longest = max(len(text) for _, text in requests)
    if longest > model.max_length:
        raise LowbitError(
            f"a continuation of {longest} tokens does not fit the model's {model.max_length} "
            "positions: use a model with more"
        )
    wholes = [(context + text)[-(model.max_length + 1) :] for context, text in requests]
    inputs = list(dict.fromkeys(tuple(whole[:-1]) for whole in wholes))
    logits = model.logits(_pad(inputs))
    rows, targets = [], []
    for whole, (_, text) in zip(wholes, requests, strict=True):
        end = len(whole) - 1
        rows.append(logits[inputs.index(tuple(whole[:-1])), end - len(text) : end])
        targets.extend(text)
    log_probs = lm.log_softmax(torch.cat(rows), vocab_size=model.vocab_size, group=model.tp_group)
    expected = torch.tensor(targets, device=log_probs.device)
    nll = lm.negative_log_likelihood(log_probs, expected, group=model.tp_group)
    return [-part.double().sum().item() for part in nll.split([len(row) for row in rows])]


def _pad(inputs: list[tuple[int, ...]]) -> Tensor:
    """int64 ``[batch, longest]``, zeros on the right."""
    longest = max(map(len, inputs))
    return torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in inputs])


def choose(log_likelihoods: list[float], item: Item, *, metric: str) -> int:
    """The likeliest choice, of equals the first; -1 if a log-likelihood is NaN.

    For ``acc_norm`` it is the likeliest per character of the choice, without the space that
    separates it from its context: Python characters, not bytes, as in the harness.
    """
    if any(map(math.isnan, log_likelihoods)):
        return -1
    lengths = [1] * len(log_likelihoods)
    if metric == "acc_norm":
        lengths = [len(text.removeprefix(" ")) for text in item.continuations]
    values = [value / length for value, length in zip(log_likelihoods, lengths, strict=True)]
    return values.index(max(values))


def average(summaries: list[dict]) -> dict:
    """The average over tasks of each task's own metric, as the paper reports it.

    Tasks count alike, however many items they have, and are independent; within a task a variant
    and native see the same items, so errors of ``difference`` and ``kept`` are of paired
    differences (`ratio_stderr`).

    Args:
        summaries: What `Task.summarize` gave for each task, all with the same variants.

    Returns:
        ``native``, its average, with ``native_stderr``, and ``results``: for each variant its own
        ``average``, the ``difference`` and ``kept``, the share of native's, each with its error,
        and the 95 % confidence interval of what is kept.
    """
    native, error = _average_of([_metric_of(summary, summary["native"]) for summary in summaries])
    results = [
        _average_result(summaries, number, native, error)
        for number in range(len(summaries[0]["results"]))
    ]
    return {"native": native, "native_stderr": error, "results": results}


def _metric_of(summary: dict, row: dict) -> tuple[float, float | None]:
    metric = summary["metric"]
    return row[metric], row[f"{metric}_stderr"]


def _average_of(values: list[tuple[float, float | None]]) -> tuple[float, float | None]:
    """The mean of independent values given with their standard errors, and its own."""
    errors = [error for _, error in values if error is not None]
    error = math.hypot(*errors) / len(errors) if len(errors) == len(values) else None
    return mean([value for value, _ in values]), error


def _average_result(
    summaries: list[dict], number: int, native: float, native_error: float | None
) -> dict:
    rows = [summary["results"][number] for summary in summaries]
    own, error = _average_of([_metric_of(s, row) for s, row in zip(summaries, rows, strict=True)])
    difference, difference_error = _average_of(
        [(row["difference"], row["difference_stderr"]) for row in rows]
    )
    kept = own / native if native else None
    kept_error = ratio_stderr(
        own,
        native,
        value_error=error,
        reference_error=native_error,
        difference_error=difference_error,
    )
    low, high = interval_95(kept, kept_error)
    return {
        "variant": rows[0]["variant"],
        "average": own,
        "average_stderr": error,
        "difference": difference,
        "difference_stderr": difference_error,
        "kept": kept,
        "kept_stderr": kept_error,
        "kept_low": low,
        "kept_high": high,
    }
