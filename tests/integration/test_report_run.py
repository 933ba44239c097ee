"""From a checkpoint to a page: all that tools/evaluate.py measures, and tools/report.py on it."""

import argparse
import json
import re
import sys
from html import unescape
from pathlib import Path

import pytest
import torch
from forks import forked
from releases import ROOT, run

from megatron_lowbit.calibration.corpus import Corpus
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.inputs import (
    check_lengths,
    check_options,
    generation,
    long_context,
    prefix_of,
    task_names,
)
from megatron_lowbit.evaluation.measures.task_data import TASKS

TEXT = ROOT / "examples" / "data" / "persuasion.txt"
CODECS = ["bf16", "recipe", "rotated-hybrid-2", "recipe@two-shot"]
LENGTH = 1024  # needles take half of it with this tokenizer, of two or three letters a token


@pytest.fixture(scope="module")
def evaluated(calibrated, tmp_path_factory) -> tuple[str, Path]:
    """What an evaluation with everything in it printed, and its JSON."""
    output = tmp_path_factory.mktemp("evaluated") / "summary.json"
    arguments = ["--simulate-tp", 3, "--load", calibrated, "--output", output, "--data", TEXT]
    arguments += ["--tokens", 128, "--seq-length", 64, "--codecs", ",".join(CODECS)]
    arguments += ["--tasks", "arc-easy,boolq", "--limit", 3, "--long-context", LENGTH]
    done = forked(None, ROOT / "tools" / "evaluate.py", *arguments, "--generate", 4)
    return done.stdout, output


def test_all_that_was_asked_for_is_measured(evaluated):
    printed, output = evaluated
    summary = json.loads(output.read_text())
    assert [(task["name"], task["items"]) for task in summary["tasks"]] == [
        ("arc-easy", 3),
        ("boolq", 3),
    ]
    (long,), (generated,) = summary["long_context"], summary["generation"]
    assert long["buckets"] == [[0, 512], [512, 1024]]
    assert (long["sequences"], long["needles"]) == (2, 20)
    assert (generated["prompts"], generated["new_tokens"]) == (16, 4)
    for measured in (*summary["tasks"], summary["task_average"], long, generated):
        assert [result["variant"] for result in measured["results"]] == CODECS
    kl = {result["variant"]: result["kl"] for result in long["results"]}
    assert all(low > high for low, high in zip(kl[CODECS[2]], kl[CODECS[1]], strict=True))
    assert kl["bf16"] == [0, 0], "native is codec bf16 in a simulation"
    same = {result["variant"]: result["mean_agreement"] for result in generated["results"]}
    assert same["bf16"] == 4 > same["rotated-hybrid-2"]
    for head in ("accuracy on zero-shot", "2 sequences of 1024", "4 tokens generated after each"):
        assert f"ckpt, TP 3, simulated, {head}" in printed
    for name in CODECS:
        assert len(re.findall(rf"^\| {re.escape(name)} ", printed, re.MULTILINE)) == 4


def test_the_report_shows_it(calibrated, evaluated, tmp_path):
    output = tmp_path / "report.html"
    index = calibrated / "lowbit"
    report = [ROOT / "tools" / "report.py", "--index", index, "--results", evaluated[1]]
    run(sys.executable, *report, "--output", output)
    plots = sorted(path.name for path in (tmp_path / "report_plots").iterdir())
    expected = (
        "long-context-1-1 quality-1-persuasion-txt ranges recipe sqnr-1 stream-1 tasks".split()
    )
    assert plots == [f"{name}.png" for name in expected]
    page = output.read_text()
    text = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", page)))
    assert "TP 3, simulated" in text
    assert "was measured with another calibration index" not in text
    for name in ("tasks", "long-context", "generation", "sqnr", "numbers"):
        assert f' id="{name}"' in page
    assert "Not measured." not in text
    summary = json.loads(evaluated[1].read_text())
    for result in summary["generation"][0]["results"]:
        cells = f"{result['variant']} {result['mean_agreement']:.1f} ± "
        assert cells in text, cells


def _options(**given) -> argparse.Namespace:
    plain = {"data": [], "tasks": None, "limit": None, "long_context": None, "generate": None}
    return argparse.Namespace(**{**plain, "seq_length": 512, **given})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (_options(), "nothing to measure: name a text with --data, or tasks with --tasks"),
        (_options(tasks="arc-easy,piqa"), "unknown task 'piqa'; known: arc-easy, .*, or all"),
        (_options(data=[TEXT], limit=3), "--limit is of items of tasks"),
        (_options(tasks="all", generate=4), "--generate 4 needs a text"),
        (_options(tasks="all", long_context=64), "--long-context 64 needs a text"),
    ],
)
def test_options_that_are_wrong_by_themselves(options, message):
    with pytest.raises(LowbitError, match=message):
        check_options(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (_options(data=[TEXT], seq_length=2049), "--seq-length 2049: the model has 2048"),
        (_options(data=[TEXT], long_context=2049), "--long-context 2049: the model has 2048"),
        (_options(data=[TEXT], generate=1986), "1986 after prompts of 64: the model has 2048"),
    ],
)
def test_lengths_that_the_model_does_not_have(options, message):
    with pytest.raises(LowbitError, match=message):
        check_lengths(options, 2048)


def test_all_names_all_tasks_and_none_names_none():
    assert task_names("all") == TASKS
    assert task_names(None) == []
    assert task_names("boolq,arc-easy,boolq") == ["boolq", "arc-easy"]
    check_options(_options(tasks="all", limit=5))
    check_options(_options(data=[TEXT], generate=4))


def _letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_what_a_tokenizer_puts_before_a_text():
    assert prefix_of(_letters, _letters) == []
    assert prefix_of(lambda text: [1, *_letters(text)], _letters) == [1]
    assert prefix_of(lambda text: [1, 2, *_letters(text), 3], _letters) == [1, 2]
    assert prefix_of(lambda text: [*_letters(text), 3], _letters) == []


def test_sequences_begin_with_the_prefix_and_keep_their_length():
    corpus = Corpus(torch.arange(1000, 6000), "digest", ["toy.txt"])
    text, needles = long_context(corpus, 1200, "toy.txt", tokenize=_letters, prefix=[1])
    assert len(text) == 2 and text.identity["seq_length"] == 1200
    assert needles.identity["seq_length"] == 1200
    prompts = generation(corpus, 8, "toy.txt", prefix=[1])
    assert prompts.identity["prompt_length"] == 64

    seen = []
    model = type("Model", (), {"max_length": 4096, "logits": staticmethod(seen.append)})
    for measure in (text, needles, prompts):
        with pytest.raises(TypeError):  # there are no logits: the tokens are all that is wanted
            measure.run(0, model, None)
    assert [tokens[0, 0].item() for tokens in seen] == [1, 1, 1]
    assert [tokens.shape[1] for tokens in seen] == [1200, 1200, 64]
    assert seen[0][0, 1] == 1000


def test_a_text_is_used_as_far_as_it_goes():
    corpus = Corpus(torch.arange(1500), "digest", ["toy.txt"])
    text, needles = long_context(corpus, 1200, "toy.txt", tokenize=_letters, prefix=[])
    assert (len(text), len(needles)) == (1, 1)
    with pytest.raises(LowbitError, match="toy.txt is too short: 1500 tokens are 0 sequences"):
        long_context(corpus, 1600, "toy.txt", tokenize=_letters, prefix=[])
    with pytest.raises(LowbitError, match="64 tokens are too short a text: needles and questions"):
        long_context(corpus, 64, "toy.txt", tokenize=_letters, prefix=[])
