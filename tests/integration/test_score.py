"""examples/score.py: log-probabilities of texts at TP 3, natively and in low bits."""

import json
from pathlib import Path

import pytest
from forks import forked
from releases import ROOT

SCORE = ROOT / "examples" / "score.py"
LOWBIT = ["--lowbit-tp-comm", "--lowbit-collective", "one-shot"]
TEXTS = ["the world of a model", "def main() -> None:", "tokens of a text", "the world"]


def score(ranks: int, load: Path, data: Path, output: Path, *more: str) -> tuple[dict, str]:
    """What it wrote and said."""
    command = [SCORE, "--load", load, "--data", data, "--output", output, "--bf16", "--batch-size"]
    done = forked(ranks, *command, "2", *more)
    return json.loads(output.read_text()), done.stdout


def test_low_bits_against_native_over_any_number_of_replicas(calibrated, tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    one, said = score(3, calibrated, data, tmp_path / "one.json", *LOWBIT)
    assert "> low-bit communication: 4 sync points use shaped-hybrid" in said
    assert "low-bit communication: 4 sync points" in one["communication"]
    assert [len(row) for row in one["log_probabilities"]] and one["texts"] == 4
    assert sum(map(len, one["log_probabilities"])) == one["tokens"] - one["texts"]
    assert all(value < 0 for row in one["log_probabilities"] for value in row)
    assert 0 < one["mismatch"]["mean"] <= one["mismatch"]["max"]
    assert 0 < one["mismatch"]["kl"] < one["mismatch"]["max"] ** 2
    two, _ = score(6, calibrated, data, tmp_path / "two.json", *LOWBIT)
    assert two["log_probabilities"] == one["log_probabilities"]
    assert two["mismatch"] == one["mismatch"]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("texts.jsonl", '{"text": "a b"}\n{"txt": 3}\n', ':2: no JSON object with a "text"'),
        ("texts.jsonl", '["a"]\n', ':1: no JSON object with a "text"'),
        ("texts.jsonl", "[" * 100_000, ":1 is not valid JSON (it is nested deeper"),
        ("texts.jsonl", '{"text": "\\ud800"}', "' has a lone surrogate)"),
        ("texts.txt", "\n \n", " has no text"),
        ("short.txt", "the world\na\n", "text 2 has 1 tokens: a score needs 2"),
    ],
)
def test_bad_texts_are_named(calibrated, tmp_path, name, content, wanted):
    path = tmp_path / name
    path.write_text(content)
    done = forked(3, SCORE, "--load", calibrated, "--data", path, "--bf16", status=1)
    assert wanted in done.stderr, done.stderr[-2000:]
