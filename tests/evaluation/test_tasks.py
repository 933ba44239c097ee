"""Scoring by likelihood: against numbers worked out by hand, and against one choice at a time."""

import math
from dataclasses import replace

import pytest
import torch
from toys import VOCAB, Words, bigram, contextual, toy

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.measures.task_data import Item, TaskData
from megatron_lowbit.evaluation.measures.tasks import (
    Task,
    average,
    choose,
    encode_pair,
    log_likelihoods,
)
from megatron_lowbit.evaluation.measures.uncertainty import (
    interval_95,
    mean,
    ratio_stderr,
    stderr,
)

ITEM = Item(["the cat"] * 3, [" sat", " sat down", " ate"], 1)


def task(items: list[Item], metric: str = "acc") -> Task:
    return Task(TaskData("toy", metric, items, "digest"))


def test_log_likelihoods_by_hand():
    words = Words()
    _, cat, sat, down, ate = words.tokenize("the cat sat down ate")
    table = torch.full((VOCAB, VOCAB), -30.0)
    table[cat, [sat, ate]] = torch.tensor([0.75, 0.25]).log()
    table[sat, [down, cat]] = torch.tensor([0.5, 0.5]).log()
    scores, _ = task([ITEM]).run(0, toy(bigram(table), words=words), None)
    expected = [math.log(0.75), math.log(0.375), math.log(0.25)]
    assert scores["log_likelihoods"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("max_length", [3, 4, 6, 100])
def test_a_batch_equals_one_choice_at_a_time(max_length):
    """Unpadded, with torch's own softmax; short models see the last tokens only."""
    logits = contextual(seed=1)
    model = toy(logits, max_length=max_length)
    context = "one two three four five"
    texts = [" six", " seven", " one two", " six seven"]
    requests = [encode_pair(context, text, model.tokenize) for text in texts]
    for text, found in zip(texts, log_likelihoods(requests, model), strict=True):
        tokens = model.tokenize(context + text)[-(max_length + 1) :]
        log_probs = logits(torch.tensor([tokens[:-1]]))[0].log_softmax(dim=-1)
        size = len(model.tokenize(text))
        places = range(len(tokens) - size, len(tokens))
        expected = sum(log_probs[place - 1, tokens[place]].item() for place in places)
        assert found == pytest.approx(expected, abs=1e-4), text


def test_equal_inputs_run_once():
    shapes = []

    def logits(tokens):
        shapes.append(tuple(tokens.shape))
        return contextual(seed=2)(tokens)

    item = Item(["is it"] * 2, [" yes", " no"], 0)
    task([item]).run(0, toy(logits), None)
    assert shapes == [(1, 2)]


def test_an_item_is_tokenized_once_for_all_runs():
    texts = []

    class Recording(Words):
        def tokenize(self, text):
            texts.append(text)
            return super().tokenize(text)

    model = toy(contextual(seed=2), words=Recording())
    measure = task([ITEM, ITEM])
    first = measure.run(0, model, None)
    count = len(texts)
    assert measure.run(0, model, None) == first
    assert len(texts) == count


def test_spaces_at_the_end_of_a_context_go_to_the_continuation():
    words = Words()
    whole = words.tokenize("a b c")
    assert encode_pair("a b ", "c", words.tokenize) == (whole[:2], whole[2:])
    assert encode_pair("a b", " c", words.tokenize) == (whole[:2], whole[2:])


def test_the_prefix_comes_before_each_context_and_counts_as_one():
    """As if the tokenizer itself put it there, as lm-evaluation-harness has it."""
    model = toy(contextual(seed=1))
    plain = task([ITEM]).run(0, model, None)
    bos = VOCAB - 1
    scores, _ = task([ITEM]).run(0, replace(model, prefix=[bos]), None)
    assert scores != plain[0]
    for text, found in zip(ITEM.continuations, scores["log_likelihoods"], strict=True):
        tokens = [bos, *model.tokenize("the cat" + text)]
        log_probs = contextual(seed=1)(torch.tensor([tokens]))[0].log_softmax(dim=-1)
        expected = sum(log_probs[i - 1, tokens[i]].item() for i in range(3, len(tokens)))
        assert found == pytest.approx(expected, abs=1e-4), text


def test_a_continuation_beyond_the_model_is_refused():
    with pytest.raises(LowbitError, match="2 tokens does not fit the model's 1 positions"):
        task([ITEM]).run(0, toy(contextual(seed=2), max_length=1), None)


def test_choices():
    item = Item(["x"] * 3, [" ab", " abcdef", " é"], 0)
    # Per character without the space: -2 / 2, -3 / 6, -0.7 / 1 (two bytes, which do not count).
    values = [-2.0, -3.0, -0.7]
    assert choose(values, item, metric="acc") == 2
    assert choose(values, item, metric="acc_norm") == 1
    assert choose([-1.0, -1.0, -2.0], item, metric="acc") == 0
    assert choose([math.nan, -1.0, -2.0], item, metric="acc") == -1


def test_summary_by_hand():
    """Four items of two choices; the gold one is the first."""
    items = [Item(["x"] * 2, [" a", " b"], 0)] * 4
    right, wrong = {"log_likelihoods": [-1.0, -2.0]}, {"log_likelihoods": [-2.0, -1.0]}
    nan = {"log_likelihoods": [math.nan, math.nan]}
    native, variant = [right, right, wrong, right], [right, wrong, wrong, nan]
    records = [{"native": n, "v": v} for n, v in zip(native, variant, strict=True)]
    summary = task(items).summarize(records)
    assert summary["name"] == "toy"
    assert summary["items"] == 4
    assert summary["native"]["acc"] == 0.75
    assert summary["native"]["acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    (result,) = summary["results"]
    assert result["variant"] == "v"
    assert result["acc"] == 0.25
    assert result["kept"] == pytest.approx(1 / 3)
    assert result["difference"] == -0.5
    assert result["difference_stderr"] == pytest.approx(math.sqrt(1 / 3 / 4))  # of 0, -1, 0, -1
    assert result["same_choice"] == 0.5


def test_the_metric_of_the_task_is_compared():
    items = [Item(["x"] * 2, [" a", " bbbb"], 1)]
    native, variant = {"log_likelihoods": [-1.0, -2.0]}, {"log_likelihoods": [-1.0, -8.0]}
    summary = task(items, "acc_norm").summarize([{"native": native, "v": variant}])
    assert summary["native"] == {
        "acc": 0,
        "acc_stderr": None,
        "acc_norm": 1,
        "acc_norm_stderr": None,
    }
    assert summary["results"][0]["difference"] == -1
    assert average([summary])["results"][0]["kept_low"] is None


def test_means_of_what_is_not_finite():
    assert mean([1.0, math.inf]) == math.inf
    assert math.isnan(mean([math.inf, -math.inf]))
    assert math.isnan(mean([1.0, math.nan]))


def _summary(seed: int, count: int, metric: str) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """A random summary, and the zeros and ones of native and variant."""
    random = torch.Generator().manual_seed(seed)
    native = torch.rand(count, generator=random) < 0.6
    variant = native ^ (torch.rand(count, generator=random) < 0.2)
    items = [Item(["x"] * 2, [" a", " b"], 0)] * count
    rows = [
        {
            name: {"log_likelihoods": [0.0, -1.0] if ok else [-1.0, 0.0]}
            for name, ok in (("native", n), ("v", v))
        }
        for n, v in zip(native.tolist(), variant.tolist(), strict=True)
    ]
    return task(items, metric).summarize(rows), native.double(), variant.double()


def test_average_over_tasks():
    """Errors of the average from the per-item residuals, task by task."""
    parts = [_summary(seed, count, m) for seed, count, m in ((1, 50, "acc"), (2, 90, "acc_norm"))]
    result = average([summary for summary, _, _ in parts])
    native = sum(n.mean().item() for _, n, _ in parts) / 2
    variant = sum(v.mean().item() for _, _, v in parts) / 2
    kept = variant / native
    differences = [stderr((v - n).tolist()) for _, n, v in parts]
    residuals = [stderr((v - kept * n).tolist()) for _, n, v in parts]
    assert result["native"] == pytest.approx(native)
    (row,) = result["results"]
    assert row["average"] == pytest.approx(variant)
    assert row["difference"] == pytest.approx(variant - native)
    assert row["difference_stderr"] == pytest.approx(math.hypot(*differences) / 2)
    assert row["kept"] == pytest.approx(kept)
    assert row["kept_stderr"] == pytest.approx(math.hypot(*residuals) / 2 / native)
    low, high = row["kept_low"], row["kept_high"]
    assert high - low == pytest.approx(2 * 1.96 * row["kept_stderr"], rel=1e-4)


def test_errors_that_do_not_exist():
    assert stderr([1]) is None
    assert math.isnan(stderr([1.0, math.nan]))
    assert interval_95(1.0, None) == (None, None)
    errors = {"value_error": 0.1, "reference_error": 0.1, "difference_error": 0.1}
    assert ratio_stderr(0.5, 0.0, **errors) is None
    # Native against itself is exactly 1, though rounding leaves a little variance.
    same = {"value_error": 0.1, "reference_error": 0.1, "difference_error": 0.0}
    assert ratio_stderr(0.7, 0.7, **same) == pytest.approx(0, abs=1e-8)
