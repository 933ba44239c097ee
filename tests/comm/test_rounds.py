"""How rounds are shared out among message sizes. The times themselves are given."""

import itertools
import time
from unittest.mock import patch

import pytest
import torch
from ranks import on_each_rank

from megatron_lowbit.codecs import get_codec
from megatron_lowbit.comm.agreement import require_equal
from megatron_lowbit.comm.policy import rounds
from megatron_lowbit.comm.policy.timings import NATIVE, Case, Kind, Timings, natives

HIDDEN = 64
ROW = 2 * HIDDEN  # bytes
SURE, OPEN = 1, 4  # tokens of messages where low bits always win, and by turns
PLACE = rounds.Place(None, {}, torch.device("cpu"))  # all ranks
KINDS = [Kind(get_codec(), get_codec().tables(HIDDEN))]
CASES = (Case("", False, NATIVE), KINDS[0].case("one-shot"))


class GivenTimes:
    """Stands for `Clock`: shows what the call before `stop` took."""

    taken = 0.0

    def __init__(self, _device):
        pass

    def stop(self):
        self.mine = GivenTimes.taken
        return self

    def seconds(self):
        return self.mine


def make_calls():
    by_turns = itertools.cycle((0.5, 0.91, 1.6))

    def native(x):
        GivenTimes.taken = 1.0

    def low_bits(x):
        GivenTimes.taken = next(by_turns) if len(x) == OPEN else 0.5

    return dict(zip(CASES, (native, low_bits), strict=True))


def measure(seconds: float) -> Timings:
    family = rounds.Family(make_calls, KINDS, PLACE)
    with patch.object(rounds, "Clock", GivenTimes):
        family.measure([SURE, OPEN], seconds, 80, all_sizes=False)
    require_equal("times", sorted(family.timings.times.items()))
    return family.timings


@on_each_rank(2)
def test_a_settled_size_leaves_its_time_to_the_others(rank):
    """With time for all rounds: 3 of a first visit, and an eighth of 80 in each of seven others."""
    timings = measure(500.0)
    sure, unsure = (timings.ratios(KINDS, "one-shot", ROW * tokens) for tokens in (SURE, OPEN))
    assert sure == [0.5] * (3 + 10)
    assert len(unsure) == 3 + 7 * 10


@on_each_rank(2)
def test_without_time_the_shortest_message_is_timed(rank):
    timings = measure(0.0)
    assert timings.sizes() == [ROW * SURE]
    assert len(timings.ratios(KINDS, "one-shot", ROW * SURE)) == 3


@on_each_rank(2)
def test_what_settled_sizes_leave_is_for_longer_messages(rank):
    """Without a share for first visits: the shortest, then another one when it is decided."""
    with patch.object(rounds, "_FIRST", 0.0):
        timings = measure(500.0)
    assert timings.sizes() == [ROW * tokens for tokens in (SURE, OPEN)]
    # Decided in its first visit and one more; the other one has the six visits that are left.
    assert len(timings.ratios(KINDS, "one-shot", ROW * SURE)) == 3 + 10
    assert len(timings.ratios(KINDS, "one-shot", ROW * OPEN)) == 3 + 6 * 10


@on_each_rank(2)
def test_a_size_that_takes_too_long_is_left_out(rank):
    def slow(x):
        time.sleep(0.0 if len(x) < 4 * OPEN else 1.0)

    family = rounds.Family(lambda: dict.fromkeys(CASES, slow), KINDS, PLACE)
    family.measure([SURE, OPEN, 4 * OPEN, 16 * OPEN], 1.0, 8, all_sizes=False)
    assert family.timings.sizes() == [ROW * tokens for tokens in (SURE, OPEN)]


@on_each_rank(2)
def test_native_is_called_once_where_calls_are_long(rank):
    def slow(x):
        time.sleep(0.0 if len(x) == SURE else 0.1)

    first, second = natives(NATIVE, 2)
    calls = dict.fromkeys([first, second, *CASES[1:]], slow)
    family = rounds.Family(lambda: calls, KINDS, PLACE)
    with patch.object(rounds, "_LONG", 0.1):
        family.measure([SURE, OPEN, 4 * OPEN], 1.0, 8, all_sizes=True)
    found = family.timings
    assert found.sizes() == [ROW * tokens for tokens in (SURE, OPEN, 4 * OPEN)]
    assert list(found.times[second]) == [ROW * SURE]


@on_each_rank(2)
def test_rounds_go_forwards_and_backwards_by_turns(rank):
    done = []
    calls = [lambda _, name=name: done.append(name) for name in "ab"]
    size = rounds._Size(SURE, HIDDEN, dict(zip(CASES, calls, strict=True)), PLACE)
    for count in (3, 1, 2):
        size.take(count)
    assert "".join(done) == "abbaabbaabba"


@pytest.mark.parametrize(("device", "computes"), [("cpu", True), ("meta", False)])
def test_a_rank_computes_before_a_call_on_a_cpu_only(monkeypatch, device, computes):
    calls = []
    monkeypatch.setattr(torch, "mm", lambda *given: calls.append(given))
    rounds.compute(torch.device(device))
    assert bool(calls) == computes
