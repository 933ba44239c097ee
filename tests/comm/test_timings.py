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
    middle_at,
    worst_at,
)
from megatron_lowbit.comm.policy.timings import MARGIN, ByTimes, Case, Kind, Timings, natives

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


# One-sided 0.0025 of Wilcoxon's signed-rank test, as tables have it; above 64 approximated.
@pytest.mark.parametrize(("rounds", "outside"), [(8, 0), (9, 0), (10, 1), (12, 5), (20, 32)])
def test_how_many_means_of_pairs_are_outside(rounds, outside):
    assert _outside(rounds) == outside


def test_where_chances_are_approximated_the_interval_is_a_little_wider():
    exact = {100: 1714, 200: 7757, 400: 33616}
    assert all(0 <= exact[n] - _outside(n) <= 0.004 * exact[n] for n in exact)


def test_the_interval_is_of_means_of_pairs():
    values = [1.0, 4.0, 9.0, 16.0] * 3  # 78 pairs, of which 5 are outside at each end
    pairs = sorted(math.sqrt(a * b) for n, a in enumerate(values) for b in values[n:])
    assert interval(values) == (pairs[5], pairs[-6])
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_the_interval_holds_what_it_is_drawn_around_as_often_as_it_says():
    draw = random.Random(1)
    ends = [interval([math.exp(draw.gauss(0, 1)) for _ in range(10)]) for _ in range(20_000)]
    for outside in (sum(upper < 1 for _, upper in ends), sum(lower > 1 for lower, _ in ends)):
        assert 0.001 < outside / 20_000 < 0.003  # 0.00195: 2 of 2**10


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


def bounds(*given: tuple[int, float]) -> list[Bound]:
    """Native takes 1 ms and 1 ms more for each KB, and low bits the worst of that."""
    natives_ms = [1.0 + kb for kb, _ in given]
    return [
        Bound(kb * KB, worst, worst * ms, ms)
        for (kb, worst), ms in zip(given, natives_ms, strict=True)
    ]


def test_between_two_sizes_the_worse_counts():
    given = bounds((8, 0.5), (32, 0.95), (128, 0.3))
    worst = [worst_at(given, size * KB) for size in (8, 9, 32, 64, 128)]
    assert worst == [0.5, 0.95, 0.95, 0.95, 0.3]


def test_beyond_the_sizes_what_gets_worse_goes_on():
    """Low bits take two thirds of native's time for each byte more, however long it gets."""
    rising = bounds((7, 0.4), (31, 0.6))  # 3.2 of 8 ms, 19.2 of 32
    assert worst_at(rising, 63 * KB) == pytest.approx((19.2 + 32 * 16 / 24) / 64)
    assert worst_at(rising, 1 << 40) == pytest.approx(16 / 24)
    assert worst_at(rising, 2 * KB) == 0.4  # towards small sizes it gets better: not counted on
    falling = bounds((8, 0.6), (32, 0.4))
    assert worst_at(falling, 1024 * KB) == 0.4
    assert worst_at(falling, 4 * KB) == pytest.approx(0.7)  # 0.1 a halving


def test_a_worst_case_grows_as_the_medians_do():
    """However it scatters itself: that of the longest size may be below that of the one before."""
    latency, bandwidth = Bound(8 * KB, 0.9, 0.5, 1.0), Bound(32 * KB, 0.6, 1.0, 1.5)
    assert worst_at([latency, bandwidth], 104 * KB) == pytest.approx(0.6 * (2.5 / 3.0) / (1 / 1.5))


def test_a_single_size_says_nothing_of_others():
    assert worst_at(bounds((8, 0.1)), 8 * KB) == 0.1
    assert worst_at(bounds((8, 0.1)), 16 * KB) == math.inf
    assert worst_at([], 8) == math.inf


def test_an_empty_message_is_as_the_shortest():
    assert worst_at(bounds((8, 0.4), (32, 0.3)), 0) == worst_at(bounds((8, 0.4), (32, 0.3)), 1)


def test_the_fastest_of_those_that_are_sure_is_taken():
    """However short its interval: one bad round of nine is no reason to take the slower one."""
    native, sizes = (10.0,) * 9, (8 * KB, 32 * KB)
    low = {
        "one-shot": dict.fromkeys(sizes, (7.0,) * 9),
        "two-shot": dict.fromkeys(sizes, (5.0,) * 8 + (8.0,)),
        "hierarchical": dict.fromkeys(sizes, (4.0,) * 8 + (9.5,)),  # not sure
    }
    times = by_times(dict.fromkeys(sizes, native), low, names=tuple(low))
    for size in (1, 8, 16, 32, 64):
        assert times.decide("native", size * KB).collective == "two-shot"


def test_between_two_sizes_the_worse_median_counts():
    given = [Bound(8 * KB, 0.9, 5.0, 10.0), Bound(32 * KB, 0.9, 6.0, 20.0)]
    assert [middle_at(given, n * KB) for n in (4, 8, 9, 32, 99)] == [0.5, 0.5, 0.5, 0.3, 0.3]


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


def test_as_many_calls_of_native_are_compared_as_a_pass_has_kinds():
    """A mean of several calls is compared with a mean, a single call with a single one."""
    kinds = [kind(bits) for bits in (2, 3, 4, 5)]
    first, second, third, fourth = natives("native", len(kinds))
    times = {first: {8: (1.0,)}, second: {8: (3.0,)}, third: {8: (8.0,)}, fourth: {8: (4.0,)}}
    compared = Timings(times | {one.case("one-shot"): {8: (2.0,)} for one in kinds})
    ratios = [compared.ratios(kinds[:count], "one-shot", 8) for count in (1, 2, 3, 4)]
    assert ratios == [[2.0], [1.0], [0.5], [0.5]]
    single = {c: points for c, points in compared.times.items() if c.codec or c == first}
    assert Timings(single).ratios(kinds, "one-shot", 8) == [2.0], "as older tuning files have it"
    assert len(natives("native", 9)) == 5


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
