"""The tables of tools/bench_quality.py, from results that are known."""

import re

import pytest

from megatron_lowbit.benchmark.quality import quality, quality_report
from megatron_lowbit.errors import LowbitError

KL = {"static-hybrid": 0.24, "recipe": 0.03, "recipe@two-shot": 0.06, "recipe-3.2": 0.1}
BITS = {"static-hybrid": 4.19, "recipe": 4.2, "recipe@two-shot": 4.2, "recipe-3.2": 3.2}
PEERS = {"int4-g32": (4.5, 0.15), "int4-g32@two-shot": (4.5, 0.3), "mxfp4": (4.25, 0.2)}
OURS = {"recipe-4.5": (4.5, 0.02), "recipe-4.5@two-shot": (4.5, 0.05)}


def _evaluation(values: dict[str, tuple[float, float]], tp_size: int = 3) -> dict:
    results = [
        {"variant": n, "delta_nll": kl / 2, "delta_nll_stderr": 0.01, "kl": kl, "kl_stderr": 0.001}
        for n, (_, kl) in values.items()
    ]
    variants = [
        {
            "variant": name,
            "bits_per_value": bits,
            "collective": "two-shot" if "@" in name else "one-shot",
        }
        for name, (bits, _) in values.items()
    ]
    text = {"name": "a.txt", "tokens": 512, "results": results}
    return {
        **{"model": "tiny", "tp_size": tp_size, "simulated": True},
        **{"variants": variants, "texts": [text], "tasks": [], "task_average": None},
    }


@pytest.fixture
def results() -> dict[str, dict]:
    main = {name: (BITS[name], KL[name]) for name in KL}
    found = [("recipe", 0.996), ("recipe@two-shot", 0.985)]
    average = [
        {
            "variant": c,
            "average": 0.4,
            "kept": kept,
            "kept_low": kept - 0.01,
            "kept_high": kept + 0.01,
        }
        for c, kept in found
    ]
    task = {
        **{"name": "boolq", "metric": "acc", "items": 9, "native": {"acc": 0.5}},
        "results": [{"variant": c, "acc": 0.5} for c, _ in found],
    }
    tasks = {**_evaluation({}), "texts": [], "tasks": [task]}
    tasks["task_average"] = {"native": 0.41, "results": average}
    return {
        "tp3": _evaluation(main),
        "tp8": _evaluation({**main, "recipe": (4.2, 0.12)}, tp_size=8),
        "tp3-peers": _evaluation({**PEERS, **OURS}),
        "tp3-candidates": _evaluation({"try-vector": (4.14, 0.05)}),
        "tp3-tasks": tasks,
    }


def test_the_worst_text_and_size_decide(results):
    rows = {row[0]: row for row in quality_report.targets(results)}
    loss = rows["loss at 4.2 bits, of static-hybrid's"]
    assert loss[1:] == ["0.100 or less", "0.500 (TP 3 a.txt: 0.125, TP 8 a.txt: 0.500)", "**no**"]
    matched = rows["bits that match static-hybrid's loss at 4.19"]
    assert matched[2:] == ["3.200 (TP 3 a.txt: 3.200, TP 8 a.txt: 3.200)", "yes"]
    kept = rows["average of the five tasks kept, recipe"]
    assert kept[2:] == ["99.6% (95 %: 98.6% to 100.6%)", "yes"]
    assert rows["average of the five tasks kept, recipe@two-shot"][3] == "**no**"
    assert rows["KL at equal bits, against every peer"][2:] == ["ahead of all", "yes"]


def test_a_peer_that_is_ahead_is_named(results):
    results["tp3-peers"]["texts"][0]["results"][1]["kl"] = 0.04  # int4-g32@two-shot
    row = quality_report.targets(results)[-1]
    assert row[2:] == ["behind int4-g32@two-shot on a.txt", "**no**"]


def test_fewer_bits_than_any_of_ours_is_no_comparison(results):
    results["tp3-peers"]["variants"][2]["bits_per_value"] = 3.0  # mxfp4
    assert "behind mxfp4" in quality_report.targets(results)[-1][2]


def cells(text: str) -> str:
    """Tables without the spaces that make their columns equally wide."""
    return re.sub(" +", " ", text)


def test_no_recipe_that_matches_and_no_error_of_a_single_sequence(results):
    for scores in results["tp3"]["texts"][0]["results"]:
        scores["delta_nll_stderr"] = None
        if scores["variant"].startswith("recipe"):
            scores["delta_nll"] = 9.0
    text = cells(quality_report.text(results))
    assert "| inf (TP 3 a.txt: inf, TP 8 a.txt: 3.200) | **no** |" in text
    assert "| static-hybrid | one-shot | 4.19 | 0.1200 | 0.2400 ± 0.0010 |" in text


def test_results_of_other_settings_are_not_taken(tmp_path):
    (tmp_path / "settings.json").write_text('{"load": "other", "tokens": 512, "limit": 1}')
    with pytest.raises(LowbitError, match="has results of .*other.*: name another directory"):
        quality.run(tmp_path, tmp_path, [], {"tokens": 512, "limit": 1})


def test_every_variant_is_in_the_text(results):
    text = cells(quality_report.text(results))
    for name in (*KL, *PEERS, *OURS, "try-vector"):
        assert f"| {name} | " in text
    assert "| native | 0.500 | 0.410 | 100 % |" in text


def test_the_steps_know_every_codec_and_name():
    from megatron_lowbit.codecs import CANDIDATES, CODECS
    from megatron_lowbit.evaluation.variants import parse_variant

    measured = {name for step in quality.steps(512, 10) for name in step.codecs}
    for name in measured:
        parse_variant(name)
    assert set(CODECS) | set(CANDIDATES) <= measured


def test_a_step_runs_a_command_of_the_package(tmp_path, capfd):
    """From any folder, and what the command says of a failure stands before ours."""
    wanted = ("--index", str(tmp_path / "none"), "--results", str(tmp_path / "none.json"))
    with pytest.raises(LowbitError, match=f"report failed: what is finished stays in {tmp_path}"):
        quality._tool("report", wanted, tmp_path / "page.html")
    assert capfd.readouterr().err.startswith("python -m megatron_lowbit report: error: cannot read")
