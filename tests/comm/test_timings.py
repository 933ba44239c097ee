"""What times allow: the interval, the sizes between and beyond, a pass of several codecs."""

import math
import random

import pytest

from megatron_lowbit.codecs import get_codec
from megatron_lowbit.comm.policy.timings import (
    MARGIN,
    ByTimes,
    Case,
    Kind,
    Timings,
    interpolate,
    lower_end,
    upper_end,
    worst_at,
)

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


@pytest.mark.parametrize(("count", "place"), [(1, 1), (8, 8), (9, 9), (12, 12), (15, 14), (24, 20)])
def test_upper_end_of_the_median(count, place):
    values = list(range(1, count + 1))
    random.Random(0).shuffle(values)
    assert upper_end(values) == place


def test_lower_end_is_the_upper_end_from_below():
    assert lower_end(list(range(1, 25))) == 5
    assert lower_end([3.0, 1.0, 2.0]) == 1.0


def test_the_interval_holds_the_median_as_often_as_it_says():
    draw = random.Random(1)
    below = sum(upper_end([draw.random() for _ in range(10)]) < 0.5 for _ in range(20_000))
    assert 0.0002 < below / 20_000 < 0.0025  # 0.00098 by the binomial distribution


def test_an_advantage_within_the_scatter_is_none():
    """Low bits take 0.8 of native's time in the median, but three rounds of nine say otherwise."""
    size, native = 8 * KB, (10.0,) * 9
    steady = (7.9, 8.1, 8.0, 8.2, 7.8, 8.0, 8.1, 7.9, 8.0)
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


def test_of_few_rounds_the_worst_counts():
    times = by_times({8: (1.0,) * 3}, {"one-shot": {8: (0.5, 0.5, 0.95)}})
    assert times.decide("native", 8).collective == "native"


@pytest.mark.parametrize(
    ("one_shot", "two_shot", "settled"),
    [
        ((0.5,) * 9, (0.5, 1.5) * 5, True),  # one is surely fast enough
        ((1.2,) * 9, (0.95,) * 9, True),  # none is
        ((1.2,) * 9, (0.5, 1.5) * 5, False),  # the other may be
        ((0.5,) * 8, (0.5,) * 8, False),  # too few rounds to be sure
        ((0.9,) * 9, (0.95,) * 9, True),
    ],
)
def test_a_size_is_settled(one_shot, two_shot, settled):
    rounds = min(len(one_shot), len(two_shot))
    low = {"one-shot": {8: one_shot[:rounds]}, "two-shot": {8: two_shot[:rounds]}}
    timings = by_times({8: (1.0,) * rounds}, low).timings
    assert timings.settled([kind()], ["one-shot", "two-shot"], 8) == settled


def test_a_kind_that_was_not_timed_is_never_settled():
    timings = by_times({8: (1.0,) * 9}, {"one-shot": {8: (0.5,) * 9}}).timings
    assert not timings.settled([kind(2)], ["one-shot"], 8)


def test_between_two_sizes_the_worse_counts():
    bounds = [(8 * KB, 0.5), (32 * KB, 0.95), (128 * KB, 0.3)]
    worst = [worst_at(bounds, size * KB) for size in (8, 9, 32, 64, 128)]
    assert worst == [0.5, 0.95, 0.95, 0.95, 0.3]


def test_beyond_the_sizes_what_gets_worse_goes_on():
    rising = [(8 * KB, 0.4), (32 * KB, 0.6)]  # 0.1 a doubling
    assert worst_at(rising, 64 * KB) == pytest.approx(0.7)
    assert worst_at(rising, 65 * KB) == pytest.approx(0.8)  # a part of a doubling is a whole one
    assert worst_at(rising, 2 * KB) == 0.4  # towards small sizes it gets better: not counted on
    falling = [(8 * KB, 0.6), (32 * KB, 0.4)]
    assert worst_at(falling, 1024 * KB) == 0.4
    assert worst_at(falling, 4 * KB) == pytest.approx(0.7)


def test_a_single_size_says_nothing_of_others():
    assert worst_at([(8 * KB, 0.1)], 8 * KB) == 0.1
    assert worst_at([(8 * KB, 0.1)], 16 * KB) == math.inf
    assert worst_at([], 8) == math.inf


def test_the_surest_of_several_is_taken():
    native, sizes = (10.0,) * 6, (8 * KB, 32 * KB)
    low = {
        "one-shot": dict.fromkeys(sizes, (6.0,) * 6),
        # Faster in the median, less sure.
        "two-shot": dict.fromkeys(sizes, (5.0, 5.0, 5.0, 5.0, 5.0, 8.0)),
    }
    times = by_times(dict.fromkeys(sizes, native), low)
    assert times.decide("native", 16 * KB).collective == "one-shot"


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
