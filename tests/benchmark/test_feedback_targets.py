"""The table of tools/bench_quality.py --feedback, from results that are known."""

import pytest

from megatron_lowbit.benchmark.quality import feedback, quality


def _texts(**kl: float) -> dict:
    results = [{"variant": name, "kl": value} for name, value in kl.items()]
    return {"texts": [{"name": "persuasion.txt", "results": results}]}


def _needles(ours: float) -> dict:
    results = [
        {"variant": name, "delta_log_likelihood": value}
        for name, value in (("recipe", -0.6), ("recipe@feedback", ours))
    ]
    return {"long_context": [{"needles": 20, "results": results}]}


@pytest.mark.parametrize(("ours", "met"), [(-0.19, "yes"), (0.19, "yes"), (-0.21, "**no**")])
def test_planted_facts_within_a_third(ours, met):
    """Off to either side: what counts is how far it is from native."""
    (row,) = feedback.targets({"feedback-long": _needles(ours)})
    assert row[-1] == met
    assert row[2] == f"recipe 0.600, recipe@feedback {abs(ours):.3f}"


@pytest.mark.parametrize(("ours", "met"), [(0.2, "yes"), (0.3, "**no**")])
def test_skipped_points_against_the_paper(ours, met):
    kl = {"static-hybrid": 0.24, "recipe@feedback": ours}
    (row,) = feedback.targets({"feedback-skip": _texts(**kl)})
    assert row[2:] == [f"persuasion {0.24 / ours:.2f}", met]


def test_a_step_with_skipped_points_has_an_index_of_its_own(tmp_path, monkeypatch):
    (step,) = (step for step in feedback.steps(512, 100) if step.skipped)
    called = []
    monkeypatch.setattr(quality, "_tool", lambda *args: called.append(args))
    index = quality._calibrated(tmp_path, tmp_path, step)
    assert index == tmp_path / "index-tp3-skip10"
    ((name, arguments, output),) = called
    assert (name, output) == ("calibrate", index)
    assert "--budget 3.5 --skip 10" in " ".join(arguments)


def test_each_step_has_a_name_of_its_own():
    names = [step.name for step in feedback.steps(512, 100)]
    assert len(names) == len(set(names))
