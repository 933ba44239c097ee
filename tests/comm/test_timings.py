"""What times allow: the interval, the sizes between and beyond, a pass of several codecs."""

import math
import random

import pytest

from megatron_lowbit.codecs import get_codec
from megatron_lowbit.comm.policy.bounds import (
    Bound,
    _outside,
    interpolate,
    interval,
    near,
    ratio_at,
)
from megatron_lowbit.comm.policy.timings import MARGIN, ByTimes, Case, Kind, Timings

KB = 1 << 10
NATIVE = Case("", False, "native")


def kind(bits: int = 4, count: int = 1, *, carries: bool = False) -> Kind:
    codec = get_codec("rotated-hybrid", bits=bits)
    return Kind(codec, codec.tables(64), count, carries)


def by_times(native, low, kinds=None, names=("one-shot", "two-shot")) -> ByTimes:
    """Decides by `native` and, for each name, by `low`: ``{size: rounds}``."""
    kinds = kinds or [kind()]
    times = {NATIVE: native} | {k.case(name): points for k in kinds for name, points in low.items()}
    return ByTimes(Timings(times), kinds, names, source="a test")


# One-sided 0.0025 of Wilcoxon's signed-rank test, as tables have it;
@pytest.mark.parametrize(("rounds", "outside"), [(8, 0), (9, 0), (10, 1), (12, 5), (20, 32)])
def test_how_many_means_of_pairs_are_outside(rounds, outside):
    assert _outside(rounds) == outside


def test_the_interval_is_of_means_of_pairs():
    values = [1.0, 4.0, 9.0, 16.0] * 3  # 78 pairs, of which 5 are outside at each end
    pairs = sorted(math.sqrt(a * b) for n, a in enumerate(values) for b in values[n:])
    assert interval(values) == (pairs[5], pairs[39], pairs[-6])
    assert interval([4.0, 1.0, 1.0]) == (1.0, 2.0, 4.0), "the slower of two in the middle"


def test_the_interval_holds_what_it_is_drawn_around_as_often_as_it_says():
    draw = random.Random(1)
    ends = [interval([math.exp(draw.gauss(0, 1)) for _ in range(10)]) for _ in range(20_000)]
    below, above = sum(end[2] < 1 for end in ends), sum(end[0] > 1 for end in ends)
    for outside in (below, above):
        assert 0.001 < outside / 20_000 < 0.003  # 0.00195: 2 of 2**10


def test_an_advantage_within_the_scatter_is_none():
    """Low bits take 0.8 of native's time in the median, but three rounds of nine say otherwise."""
    size, native = 8 * KB, (10.0,) * 9
    steady = (7.9, 8.1, 8.0, 9.9, 7.8, 8.0, 8.1, 7.9, 8.0)
    hidden = (7.9, 8.1, 8.0, 8.0, 7.8, 8.0, 12.0, 13.0, 14.0)
    taken = by_times({size: native}, {"one-shot": {size: steady}}).decide("native", size)
    assert (taken.collective, taken.why) == ("one-shot", "faster by a test")
    kept = by_times({size: native}, {"one-shot": {size: hidden}}).decide("native", size)
    assert (kept.collective, kept.why) == ("native", "native is kept by a test")


def test_what_slows_a_round_slows_all_of_it():
    """Ratios are of one round: a busy machine hides nothing that holds in every round."""
    native = tuple(10.0 * factor for factor in (1, 9, 2, 7, 1, 3))
    low = tuple(0.5 * ms for ms in native)
    times = by_times({8: native}, {"one-shot": {8: low}})
    assert times.decide("native", 8).collective == "one-shot"


@pytest.mark.parametrize(("ratio", "taken"), [(0.89, True), (0.9, True), (0.91, False)])
def test_low_bits_must_save_the_margin(ratio, taken):
    times = by_times({8: (1.0,) * 6}, {"one-shot": {8: (ratio,) * 6}})
    assert (times.decide("native", 8).collective == "one-shot") == taken
    assert MARGIN == 0.1


@pytest.mark.parametrize(
    ("rounds", "worst", "taken"), [(3, 0.9, True), (3, 0.95, False), (9, 0.95, True)]
)
def test_of_few_rounds_all_must_save_the_margin(rounds, worst, taken):
    low = (0.5,) * (rounds - 1) + (worst,)
    times = by_times({8: (1.0,) * rounds}, {"one-shot": {8: low}})
    assert (times.decide("native", 8).collective == "one-shot") == taken


def test_a_pass_waits_for_the_mean_of_its_calls():
    """Low bits are slower in most rounds and faster in the mean: of many rounds, means count."""
    native, low = (1.0, 1.0, 7.0), (1.2, 1.2, 1.2)
    for rounds, taken in ((15, "native"), (16, "one-shot"), (100, "one-shot")):
        times = by_times({8: native * rounds}, {"one-shot": {8: low * rounds}})
        assert times.decide("native", 8).collective == taken
        _, passes = times.timings.compared([kind()], "one-shot", 8)
        assert len(passes) == (45 if rounds == 15 else 24)
    assert passes[:3] == (3.0, 37 / 13, 3.0), "of 300 rounds 12, 13, 12, ..."


@pytest.mark.parametrize(
    ("one_shot", "two_shot", "still_open"),
    [
        ((0.5,) * 9, (0.5, 1.5) * 5, []),  # one is surely fast enough
        ((1.2,) * 9, (0.95,) * 9, []),  # none is
        ((1.2,) * 9, (0.5, 1.5) * 5, ["two-shot"]),
        ((0.5,) * 8, (0.5,) * 8, ["one-shot", "two-shot"]),  # too few rounds to be sure
        ((0.9,) * 9, (0.95,) * 9, []),
        ((0.85, 0.85, 0.85, 0.99) * 4, (1.5,) * 16, []),  # faster, by enough in the middle
        ((0.88, 0.95) * 9, (1.5,) * 18, ["one-shot"]),  # surely faster, perhaps by enough
        ((0.5, 1.5) * 9, (1.5,) * 9, ["one-shot"]),  # the other one has no more rounds since
        ((0.5, 1.5) * 9, (0.5,) * 8, ["one-shot", "two-shot"]),
        ((0.8, 1.1) * 3, (0.9, 1.3) * 3, ["one-shot"]),  # the other one is slower than this one
        ((0.8, 1.1) * 3, (0.85, 1.3) * 3, ["one-shot", "two-shot"]),  # not by the margin
        ((0.5, 1.5) * 9, (0.7, 1.6) * 5, ["one-shot"]),  # in the rounds that both have
        ((1.01,) * 5, (1.01,) * 4, ["two-shot"]),  # slower each time
        ((1.5,) * 4 + (1.0,), (1.5,) * 7 + (1.0,), ["one-shot", "two-shot"]),  # but once
    ],
)
def test_what_is_open_at_a_size(one_shot, two_shot, still_open):
    low = {"one-shot": {8: one_shot}, "two-shot": {8: two_shot}}
    timings = by_times({8: (1.0,) * 18}, low).timings
    assert timings.open_at([kind()], ["one-shot", "two-shot"], 8) == still_open


def test_low_bits_are_compared_with_native_in_their_rounds():
    """Which may be the first ones only; its milliseconds are told by what it takes of native's."""
    times = by_times({8: (4.0,) * 48 + (1.0,) * 96}, {"one-shot": {8: (2.0,) * 48}})
    assert times.timings.ratios([kind()], "one-shot", 8) == [0.5] * 24
    of_each = [times.timings.pass_ms([kind()], name, 8) for name in ("native", "one-shot")]
    assert of_each == [1.0, pytest.approx(0.5)]


def test_a_kind_that_was_not_timed_is_open():
    timings = by_times({8: (1.0,) * 9}, {"one-shot": {8: (0.5,) * 9}}).timings
    assert timings.open_at([kind(2)], ["one-shot"], 8) == ["one-shot"]


def bounds(*given: tuple[int, float]) -> list[Bound]:
    """Native takes 1 ms and 1 ms more for each KB, low bits a share; at the worst twice that."""
    natives_ms = [1.0 + kb for kb, _ in given]
    return [
        Bound(kb * KB, middle / 2, middle, 2 * middle, middle * ms, ms)
        for (kb, middle), ms in zip(given, natives_ms, strict=True)
    ]


def middle_at(given: list[Bound], size: int) -> float:
    """The worst goes as the middle does."""
    worst, middle = ratio_at(given, size)
    assert worst == pytest.approx(2 * middle)
    return middle


def test_between_two_sizes_the_worse_counts():
    given = bounds((8, 0.5), (32, 0.95), (128, 0.3))
    middles = [middle_at(given, size * KB) for size in (8, 9, 32, 64, 128)]
    assert middles == [0.5, 0.95, 0.95, 0.95, 0.3]


def test_what_is_near_a_size():
    given = bounds((8, 0.5), (32, 0.9), (128, 0.3))
    sizes = [[one.size // KB for one in near(given, size * KB)] for size in (1, 8, 9, 32, 1024)]
    assert sizes == [[8], [8], [8, 32], [32], [128]]
    assert not near([], 8)


@pytest.mark.parametrize(
    ("one_shot", "two_shot", "perhaps"),
    [
        ((0.85, 1.2) * 9, (1.5,) * 18, {"one-shot": 0.85}),
        ((0.95, 1.2) * 9, (1.5,) * 18, {}),  # never by the margin
        ((0.5, 1.5) * 9, (0.4, 1.5) * 9, {"one-shot": 0.5, "two-shot": 0.4}),
        ((0.8, 1.2) * 3, (1.5,) * 5, {"one-shot": 0.72}),  # of few rounds the margin comes on top
        ((1.1, 1.2, 1.2, 1.2), (1.5,) * 5, {"one-shot": 0.9}),  # of fewer than five always
    ],
)
def test_what_may_gain(one_shot, two_shot, perhaps):
    low = {"one-shot": {8: one_shot}, "two-shot": {8: two_shot}}
    times = by_times({8: (1.0,) * 18}, low)
    assert times.decide("native", 8).collective == "native"
    assert times.perhaps("native", 8) == pytest.approx(perhaps)
    assert times.perhaps("native", 1 << 30) == pytest.approx(perhaps), "as the longest"
    assert times.perhaps("native reduce-scatter", 8) == {}


def test_beyond_the_sizes_what_gets_worse_goes_on():
    """Low bits take two thirds of native's time for each byte more, however long it gets."""
    rising = bounds((7, 0.4), (31, 0.6))  # 3.2 of 8 ms, 19.2 of 32
    assert middle_at(rising, 63 * KB) == pytest.approx((19.2 + 32 * 16 / 24) / 64)
    assert middle_at(rising, 1 << 40) == pytest.approx(16 / 24)
    assert middle_at(rising, 2 * KB) == 0.4  # towards small sizes it gets better: not counted on
    falling = bounds((8, 0.6), (32, 0.4))
    assert middle_at(falling, 1024 * KB) == 0.4
    assert middle_at(falling, 4 * KB) == pytest.approx(0.7)  # 0.1 a halving


def test_a_worst_case_grows_as_the_medians_do():
    """However it scatters itself: that of the longest size may be below that of the one before."""
    latency, bandwidth = (
        Bound(8 * KB, 0.4, 0.5, 0.9, 0.5, 1.0),
        Bound(32 * KB, 0.5, 0.6, 0.7, 1.0, 1.5),
    )
    factor = (2.5 / 3.0) / (1 / 1.5)
    assert ratio_at([latency, bandwidth], 104 * KB) == pytest.approx((0.7 * factor, 0.6 * factor))


def test_a_single_size_says_nothing_of_others():
    assert middle_at(bounds((8, 0.1)), 8 * KB) == 0.1
    assert ratio_at(bounds((8, 0.1)), 16 * KB) == (math.inf, math.inf)
    assert ratio_at([], 8) == (math.inf, math.inf)


def test_an_empty_message_is_as_the_shortest():
    assert middle_at(bounds((8, 0.4), (32, 0.3)), 0) == middle_at(bounds((8, 0.4), (32, 0.3)), 1)


def test_the_fastest_of_those_that_are_sure_is_taken():
    """However short its interval: one bad round of nine is no reason to take the slower one."""
    native, sizes = (10.0,) * 9, (8 * KB, 32 * KB)
    low = {
        "one-shot": dict.fromkeys(sizes, (7.0,) * 9),
        "two-shot": dict.fromkeys(sizes, (5.0,) * 8 + (8.0,)),
        "hierarchical": dict.fromkeys(sizes, (4.0,) * 8 + (10.5,)),  # not sure
    }
    times = by_times(dict.fromkeys(sizes, native), low, names=tuple(low))
    for size in (1, 8, 16, 32, 64):
        assert times.decide("native", size * KB).collective == "two-shot"


def test_a_pass_is_decided_as_a_whole():
    """3 sync points of 6 bits lose, 9 of 2 bits win: the pass wins, and all of it goes alike."""
    two, six = kind(2, 9), kind(6, 3)
    fast, slow = two.case("one-shot"), six.case("one-shot")
    times = {NATIVE: {8: (10.0,) * 6}, fast: {8: (5.0,) * 6}, slow: {8: (12.0,) * 6}}
    both = ByTimes(Timings(times), [two, six], ["one-shot"], source="")
    assert both.decide("native", 8).collective == "one-shot"  # 9 x 5 + 3 x 12 of 120
    mostly_slow = ByTimes(Timings(times), [kind(2, 1), kind(6, 9)], ["one-shot"], source="")
    assert mostly_slow.decide("native", 8).collective == "native"
    assert both.timings.pass_times([two, six], "one-shot", 8) == (81.0,) * 6
    assert both.timings.pass_ms([two, six], "native", 8) == 120.0


def test_carries_have_times_of_their_own():
    plain, carried = kind(), kind(carries=True)
    timings = by_times({8: (1.0,) * 6}, {"one-shot": {8: (0.5,) * 6}}, [plain]).timings
    assert timings.missing([plain], "one-shot") == []
    assert timings.missing([carried], "one-shot") == ["rotated-hybrid (4 bits) with carries"]
    assert timings.pass_times([carried], "one-shot", 8) == ()
    assert math.isnan(timings.pass_ms([carried], "one-shot", 8))


def test_scatters_have_a_rival_of_their_own():
    scatter = Case("", False, "native reduce-scatter")
    low = kind().case("reduce-scatter")
    times = {NATIVE: {8: (1.0,) * 6}, scatter: {8: (9.0,) * 6}, low: {8: (5.0,) * 6}}
    by = ByTimes(Timings(times), [kind()], ["one-shot", "reduce-scatter"], source="")
    assert by.decide("native", 8).collective == "native"
    assert by.decide("native reduce-scatter", 8).collective == "reduce-scatter"


def test_interpolation_is_logarithmic_inside_and_proportional_above():
    points = [(100, 1.0), (10_000, 10.0)]
    assert interpolate(points, 10) == 1.0
    assert interpolate(points, 1000) == pytest.approx(10**0.5)
    assert interpolate(points, 10_000) == 10.0
    assert interpolate(points, 30_000) == pytest.approx(30.0)
