"""The policy: modes, tuning files, cost model, nodes, and that all ranks decide alike."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from worker import error_of

from megatron_lowbit.codecs import get_codec
from megatron_lowbit.comm import all_reduce
from megatron_lowbit.comm.policy.policy import Policy, Settings, make_policy
from megatron_lowbit.comm.policy.tuning import Tuning, interpolate, this_machine, write_tuning
from megatron_lowbit.comm.traffic import Decision, Traffic
from megatron_lowbit.errors import LowbitError

KB = 1 << 10
NAME = "rotated-hybrid (4 bits)"
# Low bits win from 64 KB on, two-shot from 1 MB on.
TIMES = {
    ("", "native"): [(8 * KB, 1.0), (64 * KB, 2.0), (1024 * KB, 20.0)],
    (NAME, "one-shot"): [(8 * KB, 2.0), (64 * KB, 1.0), (1024 * KB, 12.0)],
    (NAME, "two-shot"): [(8 * KB, 4.0), (64 * KB, 2.0), (1024 * KB, 6.0)],
    ("", "native reduce-scatter"): [(8 * KB, 1.0)],
    (NAME, "reduce-scatter"): [(8 * KB, 0.5)],
}


def _chooser(**settings) -> Policy:
    codec = get_codec()
    return make_policy(
        Settings(**settings),
        group=dist.group.WORLD,
        codec=codec,
        tables=codec.tables(64),
        device=torch.device("cpu"),
    )


def _tuning(**changes) -> Tuning:
    fields = {"machine": this_machine(), "ranks": 2, "node_size": None, "link": "test"}
    return Tuning(**{**fields, "times": TIMES, **changes})


def _choose(rank: int, directory: Path) -> dict:
    files = {
        "good": _tuning(),
        "ranks": _tuning(ranks=4),
        "machine": _tuning(machine={**this_machine(), "device": "a 486"}),
        "codec": _tuning(times={("", "native"): [(1, 1.0)], ("bf16 (16 bits)", "x"): [(1, 1.0)]}),
        "differs": _tuning(times={**TIMES, ("", "native"): [(8 * KB, 1.0 + rank)]}),
    }
    own = directory / f"rank{rank}"
    own.mkdir()
    for name, tuning in files.items():
        shared = own if name == "differs" else directory
        if rank == 0 or name == "differs":
            write_tuning(tuning, shared / f"{name}.json")
    dist.barrier()
    (own / "broken.json").write_text('{"format_version": 1, "times": 3}')
    policy = _chooser(tuning=directory / "good.json")
    traffic = Traffic()
    for tokens in (1, 512, 20_000):
        all_reduce(torch.randn(tokens, 64), collective=policy, traffic=traffic)
    probed = _chooser()
    refused = {
        name: error_of(lambda name=name: _chooser(tuning=directory / f"{name}.json"))
        for name in ("ranks", "machine", "codec", "none")
    }
    return {
        "choices": [policy.all_reduce(n).collective for n in (4 * KB, 32 * KB, 9 << 20)],
        "scatter": policy.reduce_scatter(4 * KB).collective,
        "text": policy.spans(),
        "traffic": {decision: counters.calls for decision, counters in traffic.by_decision.items()},
        "probed": [probed.all_reduce(1 << n) for n in range(10, 28)],
        "differs": error_of(lambda: _chooser(tuning=own / "differs.json")),
        "broken": error_of(lambda: _chooser(tuning=own / "broken.json")),
        "modes": error_of(lambda: _chooser(mode="one-shot" if rank else "two-shot")),
        "one_node": error_of(lambda: _chooser(mode="hierarchical", node_size=2)),
        "odd_nodes": error_of(lambda: _chooser(mode="hierarchical", node_size=3)),
        **refused,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tuning")
    return run_ranks(2, _choose, tmp_path_factory.mktemp("ranks"), directory)


def test_tuning_file_decides_by_size(results):
    for result in results:
        assert result["choices"] == ["native", "one-shot", "two-shot"]
        assert result["scatter"] == "reduce-scatter"
        assert "good.json: native, one-shot from 32 KB, two-shot from" in result["text"]


def test_what_was_chosen_is_counted_with_its_reason(results):
    why = "fastest by good.json"
    expected = {Decision(mode, why): 1 for mode in ("native", "one-shot", "two-shot")}
    assert all(result["traffic"] == expected for result in results)


def test_cost_model_chooses_alike_on_all_ranks(results):
    assert results[0]["probed"] == results[1]["probed"]
    assert all(decision.why == "fastest by the cost model" for decision in results[0]["probed"])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("ranks", "is for 4 ranks, the group has 2.*write-tuning"),
        ("machine", "is for device 'a 486', this is .*write-tuning"),
        ("codec", r"no times of rotated-hybrid \(4 bits\), only of bf16"),
        ("none", "cannot read .*none.json"),
        ("differs", "ranks differ in their (collective|tuning file)"),
        ("broken", "ranks differ in their collective|is damaged"),
        ("modes", "ranks differ in their collective"),
        ("one_node", "all 2 ranks are on one: use two-shot"),
        ("odd_nodes", "nodes of 3 ranks do not divide a group of 2"),
    ],
)
def test_refused_on_every_rank(results, case, message):
    import re

    for result in results:
        assert re.search(message, result[case]), result[case]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "ring"}, "unknown collective 'ring'"),
        ({"mode": "native", "tuning": Path("x")}, "means nothing to native"),
        ({"mode": "two-shot", "node_size": 2}, "nodes mean nothing to two-shot"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(LowbitError, match=message):
        Settings(**settings)


def test_interpolation_is_logarithmic_inside_and_proportional_above():
    points = [(100, 1.0), (10_000, 10.0)]
    assert interpolate(points, 10) == 1.0
    assert interpolate(points, 1000) == pytest.approx(10**0.5)
    assert interpolate(points, 10_000) == 10.0
    assert interpolate(points, 30_000) == pytest.approx(30.0)


def test_native_is_kept_where_low_bits_save_little():
    times = {"native": 1.0, "one-shot": 0.95}
    policy = Policy(
        "auto", seconds=lambda name, values: times[name], source="a test", candidates=("one-shot",)
    )
    assert policy.all_reduce(1).collective == "native"
    times["one-shot"] = 0.85
    assert policy.all_reduce(2).collective == "one-shot"


@pytest.mark.parametrize("text", ["", "[]", '{"format_version": 7}', '{"format_version": 1}'])
def test_damaged_tuning_files(text, tmp_path):
    from megatron_lowbit.comm.policy.tuning import _parse

    (tmp_path / "t.json").write_text(text)
    with pytest.raises(LowbitError, match="write-tuning"):
        _parse(tmp_path / "t.json")


@pytest.mark.parametrize("points", [[], [[8, 0.0]], [[8, "nan"]], [[8]]])
def test_bad_points_in_a_tuning_file(points, tmp_path):
    from megatron_lowbit.comm.policy.tuning import _parse

    write_tuning(
        Tuning(machine={}, ranks=2, node_size=None, link="", times=TIMES), tmp_path / "t.json"
    )
    content = json.loads((tmp_path / "t.json").read_text())
    content["times"][0]["points"] = points
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(LowbitError, match="is damaged"):
        _parse(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("ranks", 2.0, r"ranks: .*valid integer \(2.0"),
        ("ranks", True, "ranks: .*valid integer"),
        ("ranks", 0, "ranks: .*greater than or equal to 1"),
        ("node_size", -1, "node_size: .*greater than or equal to 1"),
        ("node_size", "2", "node_size: .*valid integer"),
        ("machine", [], "machine: .*valid dictionary"),
        ("link", None, "link: .*valid string"),
        ("extra", 1, "extra: Extra inputs"),
        ("times", {}, "times: .*valid list"),
        ("times", [], "no times of native"),
        ("points", [[8, 1e300]], r"times\[0\].points\[0\]\[1\]: .*less than or equal"),
        ("points", [[8.5, 1.0]], r"times\[0\].points\[0\]\[0\]: .*valid integer"),
        ("points", [[8, 1.0], [8, 2.0]], r"times\[0\]: points have a size more than once"),
    ],
)
def test_values_of_a_tuning_file_are_not_believed(place, value, message, tmp_path):
    from megatron_lowbit.comm.policy.tuning import _parse

    path = tmp_path / "t.json"
    write_tuning(Tuning(machine={}, ranks=2, node_size=None, link="", times=TIMES), path)
    content = json.loads(path.read_text())
    (content["times"][0] if place == "points" else content)[place] = value
    path.write_text(json.dumps(content))
    with pytest.raises(LowbitError, match=message) as error:
        _parse(path)
    assert str(path) in str(error.value) and "write-tuning" in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 400, "NaN", '"\\ud800"'])
def test_a_tuning_file_that_no_reader_should_choke_on(text, tmp_path):
    from megatron_lowbit.comm.policy.tuning import _parse

    (tmp_path / "t.json").write_text(text)
    with pytest.raises(LowbitError, match=r"t.json is not valid JSON .*write-tuning"):
        _parse(tmp_path / "t.json")
