"""Predictions for other hardware: what must win, rows, files, arguments; the check's judgement."""

import json
import sys
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
from ranks import on_each_rank

from megatron_lowbit.benchmark.prediction import prediction_check, prediction_report, prediction_run
from megatron_lowbit.benchmark.prediction.hardware import LINKS, MODELS, payload_bytes
from megatron_lowbit.benchmark.prediction.prediction import (
    COLLECTIVES,
    PASSES,
    Row,
    possible,
    predict,
)
from megatron_lowbit.benchmark.prediction.prediction_check import Result
from megatron_lowbit.benchmark.prediction.probe import probe
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.comm.agreement import require_equal
from megatron_lowbit.errors import LowbitError


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(predict())


def find(rows: list[Row], link: str, tp: int, phase: str) -> list[Row]:
    found = [row for row in rows if (row.link, row.tp, row.phase) == (link, tp, phase)]
    assert found
    return found


def test_every_possible_case_has_a_row(rows):
    assert len({(r.link, r.model, r.tp, r.phase, r.tokens) for r in rows}) == len(rows)
    cases = {(r.link, r.model, r.tp) for r in rows}
    assert len(rows) == len(cases) * len(PASSES)
    assert {r.link for r in rows} == set(LINKS)
    assert {r.model for r in rows} == set(MODELS)
    assert not any(r.link.startswith(("nvlink", "pcie")) and r.tp > 8 for r in rows)
    assert not possible("infiniband-ndr", "8b", 64)  # 32 heads


def test_rows_are_well_formed(rows):
    for row in rows:
        several = row.tp > 8
        assert list(row.seconds) == list(COLLECTIVES if several else COLLECTIVES[:3])
        assert all(0 < seconds < 100 for seconds in row.seconds.values()), row
        assert row.best in row.seconds
        assert row.speedup == 1 if row.best == "native" else row.speedup >= 1.1
        assert row.message_bytes == 2 * row.tokens * MODELS[row.model].hidden
        per_token = row.sync_points * row.seconds["native"]
        assert row.token_seconds("native") == (
            per_token if row.phase == "decode" else per_token / row.tokens
        )


def test_native_wins_in_decode_over_nvlink(rows):
    for tp in (2, 4, 8):
        assert {row.best for row in find(rows, "nvlink-4", tp, "decode")} == {"native"}


def test_native_wins_for_one_token_over_pcie(rows):
    for link in ("pcie-4", "pcie-5"):
        for tp in (2, 4, 8):
            assert find(rows, link, tp, "decode")[0].best == "native"


def test_low_bits_win_in_prefill_over_slow_links(rows):
    for link in ("pcie-4", "ethernet-25", "ethernet-100"):
        assert {row.best for row in find(rows, link, 2, "prefill")} == {"one-shot"}
        assert {row.best for row in find(rows, link, 8, "prefill")} == {"two-shot"}
        assert all(2 < row.speedup < 4.1 for row in find(rows, link, 8, "prefill"))


def test_two_levels_beat_flat_two_shot_between_nodes_in_prefill(rows):
    for row in find(rows, "infiniband-ndr", 16, "prefill"):
        assert row.seconds["hierarchical"] < row.seconds["two-shot"], row


def test_longer_messages_take_longer(rows):
    for first, second in zip(rows, rows[1:], strict=False):
        if (first.link, first.model, first.tp) == (second.link, second.model, second.tp):
            assert all(second.seconds[name] > first.seconds[name] for name in first.seconds)


def test_bits_are_those_of_the_codec():
    partial, total = payload_bytes(4096, (4, 6))
    assert partial * 8 == pytest.approx(4 + 16 * (32 + 1) / 4096, abs=0.01)
    assert total * 8 == pytest.approx(6 + 16 * (32 + 1) / 4096, abs=0.01)
    four, six = (next(predict(links=["pcie-4"], bits=bits)) for bits in ((4, 4), (4, 6)))
    assert six.seconds["two-shot"] > four.seconds["two-shot"]
    assert six.seconds["one-shot"] == four.seconds["one-shot"]


def test_summary_has_a_line_for_each_model_and_size(rows):
    text = prediction_report.summary(rows)
    lines = [line for line in text.splitlines() if line.startswith(tuple(MODELS))]
    assert len(lines) == len(rows) // len(PASSES)
    assert all(len(line) <= 110 for line in text.splitlines())
    for link in LINKS:
        assert f"\n{link}: " in "\n" + text


def test_details_have_a_line_for_each_row(rows):
    chosen = find(rows, "ethernet-100", 16, "prefill")
    text = prediction_report.details(chosen)
    lines = [line for line in text.splitlines() if line.startswith(tuple(MODELS))]
    assert len(lines) == len(chosen)
    assert "hier.-low" in text
    assert "hier" not in prediction_report.details(find(rows, "pcie-4", 8, "decode"))


def _options(**given) -> Namespace:
    fixed = {"link": None, "model": None, "tp": None, "bits": "4", "json": None, "plot": None}
    return Namespace(**{**fixed, "check": False, **given})


def test_json_has_all_rows(tmp_path, capsys):
    target = tmp_path / "rows.json"
    prediction_run.run(_options(link="pcie-5", tp=4, bits="4,6", json=target))
    content = json.loads(target.read_text())
    assert content["bits"] == [4, 6]
    assert len(content["rows"]) == len(MODELS) * len(PASSES)
    for row in content["rows"]:
        assert {"link", "model", "tp", "seconds", "token_seconds", "best", "speedup"} <= set(row)
    assert "pcie-5: 39 GB/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"link": "carrier-pigeon"}, "unknown link carrier-pigeon: choose one of nvlink-4"),
        ({"model": "9b"}, "unknown model 9b: choose one of 8b, 70b, 405b"),
        ({"tp": 3}, "unknown tensor-parallel size 3: choose one of 2, 4, 8"),
        ({"link": "pcie-4", "tp": 16}, "no case of pcie-4"),
        ({"model": "8b", "tp": 64}, "8b has 32 heads"),
        ({"bits": "four"}, "--bits four: give one number, or two"),
        ({"bits": "4,4,4"}, "--bits 4,4,4"),
        ({"bits": "9"}, "rotated-hybrid has no 9-bit version"),
        ({"check": True, "tp": 8}, "--check takes no other option"),
    ],
)
def test_bad_arguments_are_one_error(given, message):
    with pytest.raises(LowbitError) as error:
        prediction_run.run(_options(**given))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plot_without_matplotlib_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LowbitError, match=r"a plot needs matplotlib: pip install .*\[bench\]"):
        prediction_run.run(_options(link="pcie-4", plot=tmp_path / "map.png"))


def test_the_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    prediction_run.run(_options(link="pcie-4", plot=tmp_path / "map.png"))
    assert (tmp_path / "map.png").stat().st_size > 10_000
    with pytest.raises(LowbitError, match="map.nonsense: give a name that ends in"):
        prediction_run.run(_options(link="pcie-4", plot=tmp_path / "map.nonsense"))


def test_the_check_judges_what_the_model_claims():
    right = Result("1gbit", 2, 1 << 22, "native", 0.034, 0.036)
    off = Result("1gbit", 2, 1 << 22, "native", 0.034, 0.060)
    short = Result("1gbit", 2, 1 << 19, "one-shot", 0.002, 0.006)
    assert (right.ok, off.ok, short.ok) == (True, False, True)
    assert not short.judged
    text = prediction_report.checked([right, off, short]).splitlines()
    assert len({line.index("ms") for line in text}) == 1
    assert text[1].endswith("OFF")
    assert text[2].endswith("not judged")


def test_a_failed_check_is_one_error(monkeypatch, capsys):
    off = Result("1gbit", 2, 1 << 22, "native", 0.034, 0.060)
    monkeypatch.setattr(prediction_check, "measure", lambda *case: [off])
    with pytest.raises(LowbitError, match="5 of 5 predictions are off by more than 25%"):
        prediction_run.run(_options(check=True))
    assert capsys.readouterr().out.count("OFF") == 5 * prediction_check.ATTEMPTS


def test_a_case_that_is_off_once_is_measured_again(monkeypatch, capsys):
    results = iter([0.060, *[0.035] * 5])
    monkeypatch.setattr(
        prediction_check,
        "measure",
        lambda *case: [Result("1gbit", 2, 1 << 22, "native", 0.034, next(results))],
    )
    prediction_run.run(_options(check=True))
    out = capsys.readouterr().out
    assert out.count("measured again") == 1
    assert out.endswith("all 5 predictions are within 25%, the worst off by 3%\n")


@on_each_rank(2)
def test_all_ranks_take_the_same_figures(rank):
    codec, group = get_codec(), dist.group.WORLD
    found = probe(codec, codec.tables(256), group, torch.device("cpu"))
    require_equal("figures", found)
    assert all(0 <= value < float("inf") for value in vars(found).values())
    assert 1e7 < found.bandwidth < 1e12
    assert 1e7 < found.native_bandwidth < 1e12
