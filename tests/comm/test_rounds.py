"""How rounds are shared out among message sizes. The times themselves are given."""

import itertools
import time
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from given_times import GivenTimes
from ranks import on_each_rank

from megatron_lowbit.codecs import get_codec
from megatron_lowbit.comm.agreement import require_equal
from megatron_lowbit.comm.policy import rounds, runs
from megatron_lowbit.comm.policy.timings import NATIVE, Case, Kind, Timings

HIDDEN = 64
ROW = 2 * HIDDEN  # bytes
SURE, OPEN = 1, 4  # tokens of messages where low bits always win, and by turns
PLACE = runs.Place(None, {}, torch.device("cpu"), calls=1)  # all ranks
KINDS = [Kind(get_codec(), get_codec().tables(HIDDEN))]
CASES = (Case("", False, NATIVE), KINDS[0].case("one-shot"))


def make_calls():
    by_turns = itertools.cycle((0.5, 0.5, 1.0, 1.0, 1.7, 1.7))

    def native(x):
        GivenTimes.taken = 1.0

    def low_bits(x):
        GivenTimes.taken = next(by_turns) if len(x) == OPEN else 0.5

    return dict(zip(CASES, (native, low_bits), strict=True))


def measure(seconds: float) -> Timings:
    family = rounds.Family(make_calls, KINDS, PLACE)
    with patch.object(runs, "Clock", GivenTimes):
        family.measure([SURE, OPEN], seconds, 80, all_sizes=False)
    require_equal("times", sorted(family.timings.times.items()))
    return family.timings


def number_of_rounds(timings: Timings, tokens: int) -> int:
    return len(timings.times[CASES[1]][ROW * tokens])


class CallsMoveOn:
    """A clock that only calls move on, for all that reads one."""

    def __init__(self):
        self.now = 0.0

    def read(self) -> float:
        self.now += 1e-5  # computing ends
        return self.now

    def call(self, _, seconds):
        GivenTimes.taken = seconds
        self.now += seconds

    def measure(self, family, tokens, seconds):
        with (
            patch.object(runs, "Clock", GivenTimes),
            patch.object(time, "perf_counter", self.read),
        ):
            family.measure(tokens, seconds, 768, all_sizes=False)


@on_each_rank(2)
def test_a_settled_size_leaves_its_time_to_the_others(rank):
    """With time for all rounds: 3 of a first visit, and what is left of 80 in seven others."""
    timings = measure(500.0)
    sure = timings.ratios(KINDS, "one-shot", ROW * SURE)
    assert sure == [0.5] * (3 + 11)
    assert number_of_rounds(timings, OPEN) == 80


@on_each_rank(2)
def test_without_time_the_shortest_message_is_timed(rank):
    timings = measure(0.0)
    assert timings.sizes() == [ROW * SURE]
    assert number_of_rounds(timings, SURE) == 3


@on_each_rank(2)
def test_what_settled_sizes_leave_is_for_longer_messages(rank):
    """Without a share for first visits: the shortest, then another one when it is decided."""
    with patch.object(rounds, "_FIRST", 0.0):
        timings = measure(500.0)
    assert timings.sizes() == [ROW * tokens for tokens in (SURE, OPEN)]
    # Decided in its first visit and one more; the other one has the six visits that are left.
    assert number_of_rounds(timings, SURE) == 3 + 11
    assert number_of_rounds(timings, OPEN) == 80


@on_each_rank(2)
def test_a_size_that_takes_too_long_is_left_out(rank):
    clock = CallsMoveOn()
    calls = dict.fromkeys(CASES, lambda x: clock.call(x, 0.001 if len(x) < 4 * OPEN else 1.0))
    family = rounds.Family(lambda: calls, KINDS, PLACE)
    clock.measure(family, [SURE, OPEN, 4 * OPEN, 16 * OPEN], 1.0)
    assert family.timings.sizes() == [ROW * tokens for tokens in (SURE, OPEN)]


@on_each_rank(2)
def test_what_surely_gains_nothing_is_called_no_longer(rank):
    """One-shot is faster and slower by turns; two-shot is out after one visit more."""
    native, one_shot = make_calls().values()

    def slow(x):
        GivenTimes.taken = 2.0

    out = KINDS[0].case("two-shot")
    calls = {CASES[0]: native, CASES[1]: one_shot, out: slow}
    family = rounds.Family(lambda: calls, KINDS, PLACE)
    with patch.object(runs, "Clock", GivenTimes):
        family.measure([OPEN], 500.0, 80, all_sizes=False)
    assert number_of_rounds(family.timings, OPEN) == 80
    assert len(family.timings.times[out][ROW * OPEN]) == 3 + 11


@on_each_rank(2)
def test_runs_of_many_calls_stay_within_the_time(rank):
    """Native takes 10 ms and low bits 1, by three kinds."""
    clock = CallsMoveOn()
    low = {
        Case(f"kind {n}", False, name): partial(clock.call, seconds=0.001)
        for name in ("one-shot", "two-shot")
        for n in range(3)
    }
    calls = {CASES[0]: partial(clock.call, seconds=0.01), **low}
    family = rounds.Family(lambda: calls, KINDS, replace(PLACE, calls=24))
    clock.measure(family, [1, 4, 16, 64, 256], 3.0)
    assert clock.now < 3.0 + 0.3, "with two rounds before"
    assert family.timings.sizes()[1:], "more than one size"


@on_each_rank(2)
def test_a_long_message_has_no_more_than_its_share(rank):
    """Its rounds take 0.2 s, and a quarter of 4 s is for five. None is ever decided."""
    clock = CallsMoveOn()
    calls = dict.fromkeys(CASES, lambda x: clock.call(x, 0.1 if len(x) == 64 else 0.001))
    family = rounds.Family(lambda: calls, KINDS, PLACE)
    with patch.object(Timings, "open_at", return_value=["one-shot"]):
        clock.measure(family, [1, 2, 4, 64], 4.0)
    assert number_of_rounds(family.timings, 64) <= 4
    assert number_of_rounds(family.timings, 1) > 250


@on_each_rank(2)
def test_a_size_that_compiles_has_as_many_rounds(rank):
    """Its first call takes 2 s more, which count for nobody."""
    clock, compiling = CallsMoveOn(), iter((2.0,))

    def call(x):
        clock.call(x, 0.001 + (next(compiling, 0.0) if len(x) == OPEN else 0.0))

    family = rounds.Family(lambda: dict.fromkeys(CASES, call), KINDS, PLACE)
    with patch.object(Timings, "open_at", return_value=["one-shot"]):
        clock.measure(family, [SURE, OPEN], 1.0)
    of_each = [number_of_rounds(family.timings, tokens) for tokens in (SURE, OPEN)]
    assert of_each[1] == pytest.approx(of_each[0], rel=0.1)
    assert min(of_each) > 150


@on_each_rank(2)
def test_a_size_that_was_too_long_is_begun_again_when_there_is_time(rank):
    """At first it may take a third of 2 s; later all that is left, when the others are decided."""
    clock = CallsMoveOn()
    calls = {
        CASES[0]: lambda x: clock.call(x, 0.1 if len(x) == 64 else 0.001),
        CASES[1]: lambda x: clock.call(x, 0.1 if len(x) == 64 else 0.0005),
    }
    family = rounds.Family(lambda: calls, KINDS, PLACE)
    clock.measure(family, [SURE, 64], 2.0)
    assert family.timings.sizes() == [ROW * SURE, ROW * 64]
    assert clock.now < 2.0


@pytest.mark.parametrize(
    ("left", "spent", "share"),
    [
        (3.0, [1.0, 1.0], 2.5),
        (1.6, [0.2, 8.0, 0.2], 1.0),  # the one that has more gets nothing, and takes nothing away
        (2.0, [1.0, 3.0], 3.0),
        (0.0, [0.5, 0.7], 0.5),
    ],
)
def test_time_is_shared_among_those_that_had_less(left, spent, share):
    assert rounds._share(left, spent) == pytest.approx(share)


@on_each_rank(2)
def test_the_cost_of_longer_messages_is_of_all_collectives(rank):
    """Also of one that is called no longer."""
    out = KINDS[0].case("two-shot")

    def call(_, seconds):
        GivenTimes.taken = seconds

    calls = {
        case: partial(call, seconds=s) for case, s in zip((*CASES, out), (1, 2, 4), strict=True)
    }
    size = runs.Size(SURE, HIDDEN, calls, PLACE)
    with patch.object(runs, "Clock", GivenTimes):
        size.take(2)
        before = size.once
        size.keep(["one-shot"])
        size.take(3)
    assert size.once == before == pytest.approx(7 + 3 * 0.0005)
    assert (size.rounds, len(size.found[out])) == (5, 2)
