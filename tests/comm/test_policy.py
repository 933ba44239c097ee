"""The policy: modes, tuning files, times taken at load, nodes, and all ranks decide alike."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from worker import error_of

from megatron_lowbit.codecs import Statistics, get_codec
from megatron_lowbit.comm import all_reduce
from megatron_lowbit.comm.hierarchical import node_size, spans_nodes
from megatron_lowbit.comm.policy.making import make_policy
from megatron_lowbit.comm.policy.policy import Policy, Settings
from megatron_lowbit.comm.policy.timings import Case, Kind, Timings
from megatron_lowbit.comm.policy.tuning import (
    Tuning,
    _parse,
    this_machine,
    write_tuning,
)
from megatron_lowbit.comm.traffic import Decision, Traffic
from megatron_lowbit.errors import LowbitError

KB = 1 << 10
NAME = "rotated-hybrid (4 bits)"
# Low bits win from 64 KB on, two-shot from 1 MB on.
SIZES = (8 * KB, 64 * KB, 1024 * KB)
TIMES = {
    Case("", False, "native"): (1.0, 2.0, 20.0),
    Case(NAME, False, "one-shot"): (2.0, 1.0, 12.0),
    Case(NAME, False, "two-shot"): (4.0, 2.0, 6.0),
    Case("", False, "native reduce-scatter"): (1.0,),
    Case(NAME, False, "reduce-scatter"): (0.5,),
}


def _timings(times=None, rounds: int = 6) -> Timings:
    """Every round alike."""
    points = {
        case: {size: (ms,) * rounds for size, ms in zip(SIZES, each, strict=False)}
        for case, each in (times or TIMES).items()
    }
    return Timings(points)


def _policy(kinds=None, largest: int = 64 * KB, **settings) -> Policy:
    codec = get_codec()
    return make_policy(
        Settings(**settings),
        group=dist.group.WORLD,
        kinds=kinds or [Kind(codec, codec.tables(64))],
        device=torch.device("cpu"),
        largest=largest,
    )


def _tuning(**changes) -> Tuning:
    fields = {"machine": this_machine(), "ranks": 2, "node_size": None, "link": "test"}
    return Tuning(**{**fields, "timings": _timings(), **changes})


def _of_ranges() -> list[Kind]:
    """A codec with statistics of the partials, and none of the sum."""
    codec = get_codec("static-hybrid")
    return [Kind(codec, codec.tables(64, statistics=Statistics(ranges=torch.ones(2, 64))))]


def _only(*names: tuple[str, str]) -> Timings:
    return _timings({Case(codec, False, by): (1.0,) for codec, by in names})


def _decisions(rank: int, directory: Path) -> dict:
    files = {
        "good": _tuning(),
        "ranks": _tuning(ranks=4),
        "machine": _tuning(machine={**this_machine(), "device": "a 486"}),
        "codec": _tuning(timings=_only(("", "native"), ("bf16 (16 bits)", "one-shot"))),
        "differs": _tuning(timings=_timings({**TIMES, Case("", False, "native"): (1.0 + rank,)})),
    }
    own = directory / f"rank{rank}"
    own.mkdir()
    for name, tuning in files.items():
        shared = own if name == "differs" else directory
        if rank == 0 or name == "differs":
            write_tuning(tuning, shared / f"{name}.json")
    dist.barrier()
    (own / "broken.json").write_text('{"format_version": 2, "times": 3}')
    (directory / "old.json").write_text('{"format_version": 1, "times": []}')
    policy = _policy(tuning=directory / "good.json")
    traffic = Traffic()
    for tokens in (1, 512, 20_000):
        all_reduce(torch.randn(tokens, 64), collective=policy, traffic=traffic)
    measured = _measured(rank)
    shaped = get_codec("rotated-hybrid", bits=3)
    carried = [Kind(get_codec(), get_codec().tables(64), 2, True), Kind(shaped, shaped.tables(64))]
    refused = {
        name: error_of(lambda name=name: _policy(tuning=directory / f"{name}.json"))
        for name in ("ranks", "machine", "codec", "none", "old")
    }
    return {
        "decided_by_size": [policy.all_reduce(n).collective for n in (4 * KB, 32 * KB, 9 << 20)],
        "scatter": policy.reduce_scatter(4 * KB).collective,
        "text": policy.spans(),
        "traffic": {decision: counters.calls for decision, counters in traffic.by_decision.items()},
        "measured": measured,
        "carries": error_of(lambda: _policy(carried, tuning=directory / "good.json")),
        "fixed": error_of(_policy(mode="one-shot").retune),
        "differs": error_of(lambda: _policy(tuning=own / "differs.json")),
        "broken": error_of(lambda: _policy(tuning=own / "broken.json")),
        "modes": error_of(lambda: _policy(mode="one-shot" if rank else "two-shot")),
        "one_node": error_of(lambda: _policy(mode="hierarchical", node_size=2)),
        "odd_nodes": error_of(lambda: _policy(mode="hierarchical", node_size=3)),
        "no_sums": error_of(
            lambda: _policy(_of_ranges(), mode="hierarchical", node_size=1, low_bit_inside=True)
        ),
        "sums_not_sent": _policy(_of_ranges(), mode="hierarchical", node_size=1).mode,
        **refused,
    }


def _measured(rank: int) -> dict:
    """Times taken over real ranks: what they leave alone, and what they decide."""
    codecs = [get_codec("rotated-hybrid", bits=bits) for bits in (2, 4)]
    kinds = [Kind(codec, codec.tables(64), count=3, carries=True) for codec in codecs]
    torch.manual_seed(7)
    policy = _policy(kinds)
    drawn = torch.rand(1).item()
    torch.manual_seed(7)
    first = policy.times.timings
    decided = [policy.all_reduce(1 << n) for n in range(6, 20)]
    again = [policy.all_reduce(1 << n) for n in range(6, 20)]
    policy.retune()
    return {
        "cases": sorted(first.times),
        "sizes": first.sizes(),
        "rounds": {len(rounds) for points in first.times.values() for rounds in points.values()},
        "least": min(ms for points in first.times.values() for r in points.values() for ms in r),
        "timings": first,
        "undisturbed": drawn == torch.rand(1).item(),
        "fixed": decided == again,
        "decided": decided,
        "text": policy.spans(),
        "retuned": policy.times.timings != first,
        "anew": policy.times.timings,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tuning")
    return run_ranks(2, _decisions, tmp_path_factory.mktemp("ranks"), directory)


def test_tuning_file_decides_by_size(results):
    for result in results:
        assert result["decided_by_size"] == ["native", "one-shot", "two-shot"]
        assert result["scatter"] == "reduce-scatter"
        assert "by good.json: native, one-shot from 64 KB, two-shot from 1 MB; " in result["text"]


def test_what_was_chosen_is_counted_with_its_reason(results):
    modes = {"native": "native is kept", "one-shot": "faster", "two-shot": "faster"}
    expected = {Decision(mode, f"{why} by good.json"): 1 for mode, why in modes.items()}
    assert all(result["traffic"] == expected for result in results)


def test_times_taken_at_load(results):
    first, second = (result["measured"] for result in results)
    natives = [Case("", False, "native"), Case("", False, "native reduce-scatter")]
    names = [f"rotated-hybrid ({bits} bits)" for bits in (2, 4)]
    ways = ("one-shot", "reduce-scatter", "two-shot")
    assert first["cases"] == [*natives, *(Case(name, True, by) for name in names for by in ways)]
    # A token of 64 features, then four times as many.
    assert first["sizes"] == [128 << 2 * n for n in range(5)][: len(first["sizes"])]
    assert first["rounds"] <= set(range(3, 25)) and first["least"] > 0
    assert first["undisturbed"] and first["fixed"] and first["retuned"]
    assert re.match(
        r"by times of this group, 128 B to \d+ K?B, taken in \d+\.\d s: \w+", first["text"]
    )
    assert "; scatters: " in first["text"]
    # The very same times on all ranks, and so the same decisions, before and after retuning.
    for name in ("timings", "anew", "decided", "text"):
        assert first[name] == second[name], name
    assert all(d.why.endswith("by times of this group") for d in first["decided"])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("ranks", "is for 4 ranks, the group has 2.*write-tuning"),
        ("machine", "is for device 'a 486', this is .*write-tuning"),
        ("codec", r"no times of rotated-hybrid \(4 bits\), only of bf16"),
        ("none", "cannot read .*none.json"),
        ("old", "old.json is a tuning file of format 1, which has neither .*: make it with"),
        (
            "carries",
            r"no times of rotated-hybrid \(4 bits\) with carries, only of",
        ),
        ("fixed", "one-shot is fixed: only auto has times"),
        ("differs", "ranks differ in their (collective|tuning file)"),
        ("broken", "ranks differ in their collective|is damaged"),
        ("modes", "ranks differ in their collective"),
        ("one_node", "all 2 ranks are on one: use two-shot"),
        ("odd_nodes", "nodes of 3 ranks do not divide a group of 2: give --lowbit-node-size"),
        ("no_sums", "static-hybrid has no calibrated statistics of the sum"),
    ],
)
def test_refused_on_every_rank(results, case, message):
    for result in results:
        assert re.search(message, result[case]), result[case]


def test_statistics_of_the_sum_are_asked_for_only_where_it_is_sent(results):
    assert [result["sums_not_sent"] for result in results] == ["hierarchical"] * 2


@pytest.mark.parametrize(("local", "shown"), [("0", "0"), ("two", "two"), ("", "not set")])
def test_a_machine_of_no_ranks_bounds_no_node(monkeypatch, local, shown):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert not spans_nodes(None)
    with pytest.raises(LowbitError, match=f"LOCAL_WORLD_SIZE is {shown}: start with torchrun"):
        node_size(None)


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


@pytest.mark.parametrize("text", ["", "[]", '{"format_version": 7}', '{"format_version": 1}'])
def test_damaged_tuning_files(text, tmp_path):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(LowbitError, match="write-tuning"):
        _parse(tmp_path / "t.json")


def _of_nowhere() -> Tuning:
    return Tuning(machine={}, ranks=2, node_size=None, link="", timings=_timings())


def test_a_tuning_file_comes_back(tmp_path):
    write_tuning(_of_nowhere(), tmp_path / "t.json")
    assert _parse(tmp_path / "t.json").timings == _timings()


@pytest.mark.parametrize("points", [[], [[8, []]], [[8, [0.0]]], [[8, ["nan"]]], [[8, 1.0]], [[8]]])
def test_bad_points_in_a_tuning_file(points, tmp_path):
    write_tuning(_of_nowhere(), tmp_path / "t.json")
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
        ("points", [[8, [1e300]]], r"times\[0\].points\[0\]\[1\]\[0\]: .*less than or equal"),
        ("points", [[8.5, [1.0]]], r"times\[0\].points\[0\]\[0\]: .*valid integer"),
        ("points", [[8, [1.0]], [8, [2.0]]], r"times\[0\]: points have a size more than once"),
        (
            "points",
            [[8 * KB, [1.0] * 5]],
            "one-shot has 6 rounds at 8192 bytes, native 5|has 6 rou",
        ),
    ],
)
def test_values_of_a_tuning_file_are_not_believed(place, value, message, tmp_path):
    path = tmp_path / "t.json"
    write_tuning(_of_nowhere(), path)
    content = json.loads(path.read_text())
    (content["times"][0] if place == "points" else content)[place] = value
    path.write_text(json.dumps(content))
    with pytest.raises(LowbitError, match=message) as error:
        _parse(path)
    assert str(path) in str(error.value) and "write-tuning" in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 400, "NaN", '"\\ud800"'])
def test_a_tuning_file_that_no_reader_should_choke_on(text, tmp_path):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(LowbitError, match=r"t.json is not valid JSON .*write-tuning"):
        _parse(tmp_path / "t.json")
