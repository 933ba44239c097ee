"""The sweep: rows, correctness before times, tuning files, reports, the command line's errors."""

import json
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_each_rank

from megatron_lowbit.benchmark.collectives import sweep, sweep_plot, sweep_report, sweep_run
from megatron_lowbit.benchmark.collectives.sweep_plan import (
    DEFAULT_VARIANTS,
    NATIVE,
    NATIVE_FP32,
    NATIVE_SCATTER,
    Plan,
    Variant,
    choose_variants,
    parse_codec,
    parse_sizes,
    shape_of,
)
from megatron_lowbit.benchmark.collectives.targets import lower_end
from megatron_lowbit.benchmark.timing import time_calls, time_passes
from megatron_lowbit.codecs import CODECS, get_codec
from megatron_lowbit.codecs.rotated_hybrid import RotatedHybrid
from megatron_lowbit.comm.agreement import require_equal
from megatron_lowbit.comm.policy.making import make_policy
from megatron_lowbit.comm.policy.policy import Settings
from megatron_lowbit.errors import LowbitError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_all_reduce.py"
KEYS = "ranks link bytes codec collective median_ms p10_ms p90_ms native_median_ms speedup".split()
OURS = "rotated-hybrid (4 bits)"
TINY = Plan(
    variants=(*DEFAULT_VARIANTS, Variant("rotated-hybrid", "reduce-scatter")),
    sizes=(2048, 20000),
    hidden=512,
    seconds=0.001,
)


@pytest.fixture(scope="module")
def measured():
    """A tiny sweep of all default variants, by two ranks that it starts itself."""
    return sweep.run(TINY, quiet=True)


@pytest.mark.slow
def test_rows(measured):
    for row in measured.rows:
        assert list(row) == KEYS
        assert (row["ranks"], row["link"]) == (2, "loopback")
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"], row
        assert row["speedup"] == round(row["native_median_ms"] / row["median_ms"], 4), row
    # 20000 bytes are 19 tokens of 512 features and a rest; two ranks share 18 of them.
    shares = ("native reduce-scatter", "reduce-scatter")
    expected = [
        (size - size % (2048 if v.collective in shares else 1024), *v.label)
        for size in (2048, 20000)
        for v in TINY.measured
    ]
    got = [(row["bytes"], row["codec"], row["collective"]) for row in measured.rows]
    assert sorted(got) == sorted(expected)
    assert (2048, "native bf16", "native") in got
    assert (2048, OURS, "auto") in got
    assert min(measured.calls) >= 5


@pytest.mark.slow
def test_speedup_is_against_the_same_kind_of_native(measured):
    times = {(r["bytes"], r["codec"], r["collective"]): r["median_ms"] for r in measured.rows}
    for row in measured.rows:
        scatter = "reduce-scatter" in row["collective"]
        rival = "native reduce-scatter" if scatter else "native"
        assert row["native_median_ms"] == times[row["bytes"], "native bf16", rival]


@on_each_rank(4)
def test_hierarchical_under_ranks_that_run_already(rank):
    variants = (Variant("rotated-hybrid", "hierarchical"), Variant("static-hybrid", "hierarchical"))
    plan = Plan(variants, (4096,), ranks=None, hidden=128, node_size=2, seconds=0.001)
    rows = _measure(plan)
    if rank == 0:
        assert [row["collective"] for row in rows] == ["native", "hierarchical", "hierarchical"]
        assert {(row["ranks"], row["link"]) for row in rows} == {(4, "as it is")}


def _measure(plan: Plan) -> list[dict]:
    return sweep.measure(plan, device=torch.device("cpu"), quiet=True).rows


class _Broken(RotatedHybrid):
    """Wrong on one rank, or in the last token of a long message, or everywhere a little off."""

    name = "broken"
    fault = ""

    def decode_sum(self, payloads, tables, *, out=None):
        total = super().decode_sum(payloads, tables, out=out)
        if self.fault == "rank" and dist.get_rank() == 1:
            total[0, 0] += 1
        # One process sums a period of the tokens only.
        if self.fault == "tokens" and len(total) > 127:
            total[-1].zero_()
        if self.fault == "noise":
            total.mul_(1.5)
        return total


FAULTS = {
    "rank": "wrong result of broken (4 bits) one-shot on 256 x 128",
    "tokens": "at token 255, feature 0, and one process gives",
    "noise": "at least 14 dB are expected",
}


@on_each_rank(2)
def test_on_two_ranks(rank, tmp_path):
    """One pair of processes: they take seconds to start."""
    _check_a_tuning_file_that_serves_auto(tmp_path / "tuning.json")
    _check_the_order_of_timed_calls()
    for fault, message in FAULTS.items():
        CODECS["broken"] = type("Broken", (_Broken,), {"fault": fault})
        variants = (Variant("broken", "one-shot"),)
        with pytest.raises(LowbitError, match=re.escape(message)) as error:
            _measure(Plan(variants, (1 << 16,), ranks=None, hidden=128, seconds=0.001))
        require_equal("errors", str(error.value))


def _check_a_tuning_file_that_serves_auto(path: Path) -> None:
    """Sweep with a tuning file and carries, and make the policy of `auto` by that file."""
    variants = choose_variants(codecs=["int4-g32"], collectives=["one-shot", "two-shot"])
    files = {"write_tuning": path, "tuned": ("int4-g32", "rotated-hybrid")}
    _measure(
        Plan(variants, (4096, 65536), ranks=None, hidden=128, seconds=0.001, feedback=True, **files)
    )
    codec = get_codec("int4-g32")
    policy = make_policy(
        Settings("auto", tuning=path),
        group=dist.group.WORLD,
        codec=codec,
        tables=codec.tables(128),
        device=torch.device("cpu"),
    )
    reduced, scattered = policy.all_reduce(2048).collective, policy.reduce_scatter(2048).collective
    require_equal("choices", [policy.spans(), reduced, scattered])
    assert policy.spans().startswith("by tuning.json: ")
    assert reduced in ("native", "one-shot", "two-shot")
    assert scattered in ("native reduce-scatter", "reduce-scatter")
    times = json.loads(path.read_text())["times"]
    # Short messages are summed by native several times in a round.
    times = [entry for entry in times if not entry["collective"][-1].isdigit()]
    names = {(entry["codec"], entry["carries"], entry["collective"]) for entry in times}
    # The peers' formats carry nothing by default, ours do.
    codecs = [("int4-g32 (4 bits)", False), (OURS, False), (OURS, True)]
    low = {(*codec, by) for codec in codecs for by in ("one-shot", "two-shot", "reduce-scatter")}
    assert names == {("", False, "native"), ("", False, "native reduce-scatter"), *low}
    assert {tuple(size for size, _ in entry["points"]) for entry in times} == {(4096, 65536)}


def _check_the_order_of_timed_calls() -> None:
    """What two cases do while they are timed; ``.`` is what prepares."""
    # One call of each says how long it takes; three untimed ones lead in a turn of a short one.
    turns = {time_calls: ".aaaa.bbbb.bbbb.aaaa", time_passes: 4 * ".a" + 8 * ".b" + 4 * ".a"}
    for time_them, two_rounds in turns.items():
        done = []
        calls = [partial(done.append, name) for name in "ab"]
        prepare = partial(done.append, ".")
        times = time_them(calls, seconds=1e-9, device=torch.device("cpu"), prepare=prepare)
        assert [t.calls for t in times] == [7, 7]
        assert "".join(done) == "ab" + (4 * two_rounds)[: 7 * len(two_rounds) // 2]


def _row(size: int, codec: str, by: str, speedup: float, ranks: int = 2) -> dict:
    times = [8 / speedup, 7 / speedup, 9 / speedup, 8.0, speedup]
    return dict(zip(KEYS, [ranks, "1gbit", size, codec, by, *times], strict=True))


ROWS = [
    _row(8192, "native bf16", "native", 1),
    _row(8192, "native fp32", "native", 0.5),
    _row(8192, OURS, "one-shot", 0.8),
    _row(8192, OURS, "auto", 0.96),
    _row(1 << 20, "native bf16", "native", 1),
    _row(1 << 20, OURS, "one-shot", 3.5),
    _row(1 << 20, OURS, "auto", 0.94),
    _row(1 << 20, OURS, "one-shot", 0.25, ranks=4),
    _row(1 << 20, "native bf16", "native", 1, ranks=4),
    _row(8192, OURS, "one-shot", 0.4, ranks=4),
    _row(8192, "native bf16", "native", 1, ranks=4),
    _row(8192, "native bf16", "native reduce-scatter", 1),
    _row(8192, OURS, "reduce-scatter", 1.5),
]


def test_losses_name_every_case():
    assert sweep_report.losses(ROWS) == [
        "2 ranks, 1gbit, rotated-hybrid 4 one-shot: 0.80x at 8 KB",
        "2 ranks, 1gbit, rotated-hybrid 4 auto: 0.94x at 1 MB",
        "4 ranks, 1gbit, rotated-hybrid 4 one-shot: 0.25x at 1 MB, 0.40x at 8 KB",
    ]


def test_unsteady_times_are_said():
    assert sweep_report.unsteady(ROWS) == ""
    shaky = [row | {"p90_ms": 4 * row["p10_ms"]} for row in ROWS[:4]] + ROWS[4:]
    assert sweep_report.unsteady(shaky).startswith(
        "unsteady: p90 is above 3 times p10 in 4 of 13 cases"
    )


def test_tables():
    first, second, third = sweep_report.tables(ROWS).split("\n\n")
    assert first.startswith("all-reduce, 2 ranks, 1gbit: speedup against native BF16\n")
    lines = [line.split() for line in first.splitlines()]
    assert lines[-2] == ["8", "KB", "8", "0.50x", "0.80x", "0.96x"]
    assert lines[-1] == ["1", "MB", "8", "-", "3.50x", "0.94x"]
    assert second.startswith("reduce-scatter, 2 ranks, 1gbit")
    assert second.split()[-3:] == ["KB", "8", "1.50x"]
    assert third.startswith("all-reduce, 4 ranks, 1gbit")


@pytest.mark.slow
def test_json_and_its_sidecar(measured, tmp_path):
    path = tmp_path / "results.json"
    sweep_report.write(
        measured.rows, path, sweep_report.describe([measured], ["python", "tool.py"])
    )
    assert json.loads(path.read_text()) == measured.rows
    meta = json.loads((tmp_path / "results.meta.json").read_text())
    assert meta["command"] == ["python", "tool.py"]
    assert meta["machine"]["backend"] == "gloo"
    assert meta["versions"]["torch"] == torch.__version__
    assert [entry["bytes"] for entry in meta["sweeps"][0]["auto"]] == [2048, 19456]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "results.json",
        "results.meta.json",
    ]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    sweep_plot.draw(ROWS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]


def test_sizes():
    assert parse_sizes("8K, 2m,8192,3MB") == (8192, 2 << 20, 3 << 20)
    assert shape_of(1 << 20, hidden=4096) == (128, 4096)
    assert shape_of(20000, hidden=4096) == (2, 4096)
    assert shape_of(4096, hidden=4096) == (1, 2048)
    assert shape_of(8192, hidden=4096, multiple=8) == (8, 512)
    assert shape_of(11 * 8192, hidden=4096, multiple=4) == (8, 4096)


def test_codecs():
    assert repr(parse_codec("rotated-hybrid")) == OURS
    assert repr(parse_codec("rotated-hybrid-4+6")) == "rotated-hybrid (4+6 bits)"
    assert repr(parse_codec("int4-g32")) == "int4-g32 (4 bits)"
    assert repr(parse_codec("int4-g32-6")) == "int4-g32 (6 bits)"


@pytest.mark.parametrize(
    ("codec", "collective", "name"),
    [
        ("native bf16", "native", "native bf16"),
        ("rotated-hybrid (4+6 bits)", "two-shot", "rotated-hybrid 4+6 two-shot"),
        ("fp8-g256 (8 bits)", "auto", "fp8-g256 auto"),
        ("int4-g32 (6 bits)", "auto", "int4-g32 6 auto"),
    ],
)
def test_names(codec, collective, name):
    assert sweep_report.variant_name(_row(1, codec, collective, 1)) == name


def test_variants():
    assert choose_variants() == DEFAULT_VARIANTS
    both = choose_variants(codecs=["bf16", "fp8-g256"], collectives=["auto", "two-shot"])
    assert [(v.codec, v.collective) for v in both] == [
        ("bf16", "auto"),
        ("bf16", "two-shot"),
        ("fp8-g256", "auto"),
        ("fp8-g256", "two-shot"),
    ]
    assert {v.codec for v in choose_variants(collectives=["one-shot"])} == {
        "rotated-hybrid",
        "static-hybrid",
        "int8-token",
    }
    scatter = choose_variants(collectives=["reduce-scatter"])
    assert scatter == (Variant("rotated-hybrid", "reduce-scatter"),)
    assert Plan(scatter).measured == (NATIVE, NATIVE_SCATTER, *scatter)
    assert Plan((NATIVE_FP32,)).measured == (NATIVE, NATIVE_FP32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": "8X"}, "'8X' is no message size: write it like 8K or 2M"),
        ({"sizes": "8K,,2M"}, "'' is no message size"),
        ({"sizes": "10"}, "10 bytes is no message size: take 1K to 4G"),
        ({"ranks": "1"}, "1 is no number of ranks: take 2 to 254"),
        ({"ranks": "2,x"}, "'2,x' is no number of ranks: write it like"),
        ({"link": "fast"}, "'fast' is no link rate"),
        ({"codecs": "nope"}, "unknown codec 'nope': choose one of bf16"),
        ({"codecs": "rotated-hybrid-9"}, "codec rotated-hybrid has no 9-bit version"),
        ({"collectives": "ring"}, "unknown collective 'ring': choose from one-shot"),
        ({"collectives": "hierarchical"}, "hierarchical needs the ranks of a node"),
        ({"node_size": 2}, "2 ranks are not several nodes of 2"),
        ({"node_size": 2, "collectives": "one-shot"}, "--node-size means nothing without"),
        ({"seconds": 0.0}, "0.0 is no time to measure"),
        ({"ranks": "2,4", "write_tuning": Path("t")}, "for one number of ranks"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(LowbitError, match=message.replace("[", r"\[")):
        sweep_run.make_plans(_options(**arguments))


def test_plans_for_several_numbers_of_ranks(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    made = sweep_run.make_plans(_options(ranks="2,4", node_size=2))
    assert [(plan.ranks, plan.node_size) for plan in made] == [(2, None), (4, 2)]
    assert "2 ranks are not several nodes of 2: measured without" in capsys.readouterr().out
    started = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for variable, value in started.items():
        monkeypatch.setenv(variable, value)
    assert [plan.ranks for plan in sweep_run.make_plans(_options())] == [None]
    with pytest.raises(LowbitError, match="link 1gbit means nothing to ranks that torchrun"):
        sweep_run.make_plans(_options(link="1gbit"))


def _options(**given):
    names = "sizes codecs collectives ranks link node_size tuning output plot write_tuning".split()
    defaults = {name: None for name in names} | {"hidden": 4096, "seconds": 1.0, "feedback": False}
    return sweep_run.Namespace(**(defaults | given))


@pytest.mark.slow
def test_what_a_rank_says_comes_back_as_one_line(tmp_path, capfd):
    variants, missing = (Variant("rotated-hybrid", "auto"),), tmp_path / "no.json"
    with pytest.raises(LowbitError, match=f"^cannot read {missing}: .*make it with"):
        sweep.run(Plan(variants, (4096,), tuning=missing))
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.slow
def test_interrupt_leaves_nothing(tmp_path):
    arguments = ["--ranks", "2", "--sizes", "4K,64M", "--output", str(tmp_path / "results.json")]
    command = [sys.executable, str(TOOL), *arguments, "--seconds", "0.01"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    tool = subprocess.Popen(command, text=True, **pipes)
    assert "4 KB: checked" in tool.stdout.readline()  # and now it measures 64 MB
    tool.send_signal(signal.SIGINT)
    _, errors = tool.communicate(timeout=20)
    assert tool.returncode == 130
    assert errors.splitlines()[-1] == "bench_all_reduce.py: interrupted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ratios", "end"),
    [
        ([1.2], 1.2),
        ([1.4, 1.2], 1.2),  # an interval of two would end below nothing
        ([1.0, 1.2, 1.4], 1.2 - 4.303 * 0.2 / 3**0.5),
        ([1.0, 1.1, 1.2, 1.3, 1.4], 1.2 - 2.776 * 0.025**0.5 / 5**0.5),
    ],
)
def test_the_lower_end_of_few_runs(ratios, end):
    assert lower_end(ratios) == pytest.approx(end)
