"""Error at sync points: dB from known errors, and which points are named."""

import contextlib
import math

import pytest
import torch

from megatron_lowbit.evaluation.measures.measure import NATIVE
from megatron_lowbit.evaluation.measures.sync_error import SyncError, extremes
from megatron_lowbit.model.language_model import LanguageModel

POINTS = [(1, "a"), (2, "b")]


def _summary(errors: dict[str, list[float]], *, zeros: bool = False) -> dict:
    """Of two sequences of 3 tokens; a variant's error at a point is a share of the value."""
    observers = []

    @contextlib.contextmanager
    def observing(observe):
        observers.append(observe)
        yield

    def logits(tokens):
        for point in range(len(POINTS)):
            exact = tokens[0, :, None] * torch.ones(1, 4)
            if zeros and point == 0:
                exact = torch.zeros_like(exact)
            sums = {name: exact * (1 + share[point]) for name, share in errors.items()}
            if "worst" in errors:  # one token is ten times as far off
                sums["worst"][1] = exact[1] * (1 + 10 * errors["worst"][point])
            observers[-1](point, exact, sums)

    model = LanguageModel(logits, 9, 9, None, tokenize=list, detokenize=str)
    sequences = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    measure = SyncError(sequences, POINTS, observing=observing, sha256="0")
    records = []
    for number in range(len(measure)):
        scores, native = measure.run(number, model, None)
        assert measure.run(number, model, native) == ({}, None), "variants have nothing to do"
        records.append({NATIVE: scores})
    return measure.summarize(records)


def test_decibel():
    summary = _summary({"good": [0.01, 0.1], "worst": [0.01, 0.01], "exact": [0, 0]})
    assert summary["sequences"] == 2
    first, second = summary["points"]
    assert (first["layer"], first["name"]) == POINTS[0]
    assert first["sqnr"]["good"] == pytest.approx(40, abs=1e-4)
    assert second["sqnr"]["good"] == pytest.approx(20, abs=1e-4)
    assert first["worst_token_sqnr"]["worst"] == pytest.approx(20, abs=1e-4)
    squares = [1, 4, 9, 16, 25, 36]
    noise = sum(s * (100 if n in (1, 4) else 1) for n, s in enumerate(squares)) * 1e-4
    expected = 10 * math.log10(sum(squares) / noise)
    assert first["sqnr"]["worst"] == pytest.approx(expected, abs=1e-4)
    assert first["sqnr"]["exact"] == math.inf


def test_the_streams_error_is_what_is_left_of_all_sums():
    """An error that the next sum takes back is gone; two alike have four times the power."""
    summary = _summary({"piles up": [0.01, 0.01], "repaired": [0.01, -0.01]})
    first, second = (point["stream_sqnr"] for point in summary["points"])
    assert first == pytest.approx({"piles up": 40, "repaired": 40}, abs=1e-3)
    assert second["piles up"] == pytest.approx(40, abs=1e-3)
    assert second["repaired"] > 100


def test_with_feedback_only_what_is_not_finite_is_named():
    shares = {"plain": [0.001, 0.5], "plain@feedback": [0.001, 0.5]}
    assert [line.partition(":")[0] for line in extremes(_summary(shares)["points"])] == ["plain"]
    broken = _summary({"recipe@feedback": [0.001, math.nan]})["points"]
    assert extremes(broken)[0].startswith("recipe@feedback: layer 2 b is not finite")


def test_what_is_not_finite_is_so_in_the_summary():
    summary = _summary({"bad": [math.nan, 0.1], "huge": [math.inf, 0.1]})
    assert math.isnan(summary["points"][0]["sqnr"]["bad"])
    assert math.isnan(summary["points"][0]["worst_token_sqnr"]["bad"])
    assert summary["points"][0]["sqnr"]["huge"] == -math.inf
    assert summary["points"][1]["sqnr"]["bad"] == pytest.approx(20, abs=1e-4)


def _points(*values: float) -> list[dict]:
    return [{"layer": n, "name": "p", "sqnr": {"x": v}} for n, v in enumerate(values, start=1)]


def test_extreme_sync_points_are_named():
    assert extremes(_points(20, 21, 22, math.inf)) == []
    assert extremes(_points(20, 9.9, 22)) == ["x: layer 2 p has 9.9 dB (median 20.0)"]
    assert extremes(_points(40, 29, 40)) == ["x: layer 2 p has 29.0 dB (median 40.0)"]
    (line,) = extremes(_points(20, 8, 22, math.nan, 25))
    assert line == "x: layer 4 p is not finite, layer 2 p has 8.0 dB (median 21.0)"
    (line,) = extremes(_points(*[5.0] * 6))
    assert line.endswith("layer 4 p has 5.0 dB and 2 more (median 5.0)")
    (line,) = extremes(_points(math.nan))
    assert line == "x: layer 1 p is not finite (median nan)"


def test_a_pruned_layer_does_not_make_the_others_stand_out():
    """Sums of zeros have no error: most sync points of a pruned model may be like that."""
    assert extremes(_points(20, 21, *[math.inf] * 5)) == []
    assert extremes(_points(*[math.inf] * 3)) == []
    (line,) = extremes(_points(20, 21, 22, 5, *[math.inf] * 5))
    assert line == "x: layer 4 p has 5.0 dB (median 20.5)"


def test_zeros_have_no_error():
    summary = _summary({"exact": [0, 0.1]}, zeros=True)
    first, second = summary["points"]
    assert first["sqnr"]["exact"] == first["worst_token_sqnr"]["exact"] == math.inf
    assert extremes(summary["points"]) == []
    assert second["sqnr"]["exact"] == pytest.approx(20, abs=1e-4)
