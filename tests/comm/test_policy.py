"""The policy: modes, tuning files, times taken at load, nodes, and all ranks decide alike."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from json_places import put
from ranks import on_each_rank

from megatron_lowbit.codecs import Statistics, get_codec
from megatron_lowbit.comm import all_reduce
from megatron_lowbit.comm.agreement import require_equal
from megatron_lowbit.comm.hierarchical import node_size, spans_nodes
from megatron_lowbit.comm.policy.making import _stand_ins, candidates, make_policy
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
POINTS = "times/0/points"
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


def test_a_codec_without_statistics_of_the_sum_goes_by_one_shot():
    plain = get_codec()
    assert candidates(_of_ranges()) == ["one-shot"]
    assert candidates([Kind(plain, plain.tables(64))]) == ["one-shot", "two-shot"]


def _only(*names: tuple[str, str]) -> Timings:
    return _timings({Case(codec, False, by): (1.0,) for codec, by in names})


@on_each_rank(2)
def test_a_tuning_file_decides_by_size(rank, tmp_path):
    _write_by_first(rank, tmp_path / "good.json", _tuning())
    policy, traffic = _policy(tuning=tmp_path / "good.json"), Traffic()
    decided = [policy.all_reduce(size).collective for size in (4 * KB, 32 * KB, 9 << 20)]
    assert decided == ["native", "one-shot", "two-shot"]
    assert policy.reduce_scatter(4 * KB).collective == "reduce-scatter"
    spans = "by good.json: native, one-shot from 64 KB, two-shot from 1 MB; "
    assert spans in policy.spans()
    for tokens in (1, 512, 20_000):
        all_reduce(torch.randn(tokens, 64), collective=policy, traffic=traffic)
    why = {"native": "native is kept", "one-shot": "faster", "two-shot": "faster"}
    counted = {decision: counters.calls for decision, counters in traffic.by_decision.items()}
    assert counted == {Decision(mode, f"{why[mode]} by good.json"): 1 for mode in why}


def _write_by_first(rank: int, path: Path, tuning: Tuning) -> None:
    if rank == 0:
        write_tuning(tuning, path)
    dist.barrier()


@on_each_rank(2)
def test_times_taken_at_load(rank):
    """What they leave alone, and what they decide: alike on all ranks, also after retuning."""
    codecs = [get_codec("rotated-hybrid", bits=bits) for bits in (2, 4)]
    torch.manual_seed(7)
    policy = _policy([Kind(codec, codec.tables(64), count=3, carries=True) for codec in codecs])
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1)), "the times drew random numbers"
    first = policy.times.timings
    natives = [Case("", False, name) for name in ("native", "native reduce-scatter")]
    ways = ("one-shot", "reduce-scatter", "two-shot")
    low = [Case(str(codec), True, by) for codec in codecs for by in ways]
    assert sorted(first.times) == sorted([*natives, *low])
    # A token of 64 features, then four times as many.
    assert first.sizes() == [128 << 2 * n for n in range(5)][: len(first.sizes())]
    taken = [each for points in first.times.values() for each in points.values()]
    assert {len(each) for each in taken} <= set(range(3, 49))
    assert min(ms for each in taken for ms in each) > 0
    decided = [policy.all_reduce(1 << n) for n in range(6, 20)]
    assert decided == [policy.all_reduce(1 << n) for n in range(6, 20)]
    assert all(one.why.endswith("by times of this group") for one in decided)
    text = policy.spans()
    said = r"by times of this group, 128 B to \d+ K?B, taken in \d+\.\d s: \w+"
    assert re.match(said, text) and "; scatters: " in text
    policy.retune()
    assert policy.times.timings != first
    require_equal("all of it", [first, decided, text, policy.times.timings])


def test_three_kinds_stand_for_all_at_load():
    """Each for those of fewer bits, too, so that a pass is never timed as shorter than it is."""
    counts = {2: 4, 3: 8, 4: 8, 5: 4, 6: 4}
    kinds = [
        Kind(codec, codec.tables(64), count)
        for codec, count in ((get_codec("rotated-hybrid", bits=b), n) for b, n in counts.items())
    ]
    given = random.Random(0).sample(kinds, 5)
    assert [(one.codec.bits, one.count) for one in _stand_ins(given)] == [(3, 12), (4, 8), (6, 8)]
    assert _stand_ins(kinds[:3]) == kinds[:3]
    mostly_two = [replace(kinds[0], count=90), *kinds[1:]]
    found = [(one.codec.bits, one.count) for one in _stand_ins(mostly_two)]
    assert found == [(2, 90), (3, 8), (6, 16)]


def test_nothing_stands_for_what_may_take_longer():
    codecs = [get_codec("rotated-hybrid", bits=bits) for bits in (2, (3, 6), 4)]
    codecs.append(get_codec("int4-g32"))
    kinds = [Kind(codec, codec.tables(64)) for codec in codecs]
    kinds += [Kind(codecs[2], codecs[2].tables(64), 40, carries=True)]
    found = [(str(one.codec), one.carries, one.count) for one in _stand_ins(kinds)]
    name = "rotated-hybrid"
    assert found == [
        ("int4-g32 (4 bits)", False, 1),
        (f"{name} (3+6 bits)", False, 2),  # and (2 bits)
        (f"{name} (4 bits)", True, 41),  # with carries for without
    ]


@on_each_rank(2)
def test_what_cannot_be_met_is_refused_on_every_rank(rank, tmp_path):
    (tmp_path / "old.json").write_text('{"format_version": 1, "times": []}')
    others = _only(("", "native"), ("bf16 (16 bits)", "one-shot"))
    unfit = {
        "is for 4 ranks, the group has 2.*write-tuning": {"ranks": 4},
        "is for device 'a 486', this is .*write-tuning": {
            "machine": {**this_machine(), "device": "a 486"}
        },
        r"no times of rotated-hybrid \(4 bits\), only of bf16": {"timings": others},
    }
    for number, (message, changes) in enumerate(unfit.items()):
        _write_by_first(rank, tmp_path / f"{number}.json", _tuning(**changes))
        _refused(message, tuning=tmp_path / f"{number}.json")
    _write_by_first(rank, tmp_path / "good.json", _tuning())
    shaped = get_codec("rotated-hybrid", bits=3)
    carried = [Kind(get_codec(), get_codec().tables(64), 2, True), Kind(shaped, shaped.tables(64))]
    of_carried = r"no times of rotated-hybrid \(4 bits\) with carries, only of"
    _refused(of_carried, carried, tuning=tmp_path / "good.json")
    _refused("cannot read .*none.json", tuning=tmp_path / "none.json")
    own = tmp_path / f"rank{rank}.json"
    native = {Case("", False, "native"): (1.0 + rank,)}
    write_tuning(_tuning(timings=_timings({**TIMES, **native})), own)
    _refused("ranks differ in their (collective|tuning file)", tuning=own)
    own.write_text('{"format_version": 2, "times": 3}')
    _refused("ranks differ in their collective|is damaged", tuning=own)
    old = r"old.json is a tuning file of format 1, which has neither .*: make it with"
    _refused(old, tuning=tmp_path / "old.json")
    _refused("ranks differ in their collective", mode="one-shot" if rank else "two-shot")
    _refused("all 2 ranks are on one: use two-shot", mode="hierarchical", node_size=2)
    odd = "nodes of 3 ranks do not divide a group of 2: give --lowbit-node-size"
    _refused(odd, mode="hierarchical", node_size=3)
    with pytest.raises(LowbitError, match="one-shot is fixed: only auto has times"):
        _policy(mode="one-shot").retune()
    nodes = {"mode": "hierarchical", "node_size": 1}
    assert _policy(_of_ranges(), **nodes).mode == "hierarchical", "whose sum is not sent"
    of_sum = "static-hybrid has no calibrated statistics of the sum"
    _refused(of_sum, _of_ranges(), **nodes, low_bit_inside=True)


def _refused(message: str, kinds=None, **settings) -> None:
    with pytest.raises(LowbitError, match=message):
        _policy(kinds, **settings)


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


def _of_nowhere() -> Tuning:
    return Tuning(machine={}, ranks=2, node_size=None, link="", timings=_timings())


def test_a_tuning_file_comes_back(tmp_path):
    """Low bits that surely gain nothing have fewer rounds than native."""
    times = _timings().times
    times[Case(NAME, False, "one-shot")] = {size: (3.0,) * 2 for size in SIZES}
    write_tuning(replace(_of_nowhere(), timings=Timings(times)), tmp_path / "t.json")
    assert _parse(tmp_path / "t.json").timings == Timings(times)


def test_all_codecs_of_a_tuning_file_have_as_many_rounds(tmp_path):
    times = _timings().times
    times[Case("another", False, "one-shot")] = {SIZES[0]: (0.5,) * 5}
    write_tuning(replace(_of_nowhere(), timings=Timings(times)), tmp_path / "t.json")
    with pytest.raises(LowbitError, match="has 6 rounds at 8192 bytes, one-shot has 5, native 6"):
        _parse(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("format_version", 7, "format"),
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
        (POINTS, [], "is damaged"),
        (POINTS, [[8, []]], "is damaged"),
        (POINTS, [[8, [0.0]]], "is damaged"),
        (POINTS, [[8, ["nan"]]], "is damaged"),
        (POINTS, [[8, 1.0]], "is damaged"),
        (POINTS, [[8]], "is damaged"),
        (POINTS, [[8, [1e300]]], r"times\[0\].points\[0\]\[1\]\[0\]: .*less than or equal"),
        (POINTS, [[8.5, [1.0]]], r"times\[0\].points\[0\]\[0\]: .*valid integer"),
        (POINTS, [[8, [1.0]], [8, [2.0]]], r"times\[0\]: points have a size more than once"),
        (
            POINTS,
            [[8 * KB, [1.0] * 5]],
            "one-shot has 6, native 5",
        ),
    ],
)
def test_values_of_a_tuning_file_are_not_believed(place, value, message, tmp_path):
    path = tmp_path / "t.json"
    write_tuning(_of_nowhere(), path)
    content = json.loads(path.read_text())
    put(content, place, value)
    path.write_text(json.dumps(content))
    with pytest.raises(LowbitError, match=message) as error:
        _parse(path)
    assert str(path) in str(error.value) and "write-tuning" in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", '{"format_version": 1}', '"\\ud800"'])
def test_what_is_no_tuning_file_at_all(text, tmp_path):
    """What else is no JSON is in test_json_files.py."""
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(LowbitError, match="t.json .*write-tuning"):
        _parse(tmp_path / "t.json")
