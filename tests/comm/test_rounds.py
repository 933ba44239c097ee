"""How rounds are shared out among message sizes. The times themselves are given."""

import itertools
import time
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import on_each_rank

from megatron_lowbit.codecs import get_codec
from megatron_lowbit.comm.agreement import require_equal
from megatron_lowbit.comm.policy import rounds
from megatron_lowbit.comm.policy.timings import NATIVE, Case, Kind, Timings, natives

HIDDEN = 64
ROW = 2 * HIDDEN  # bytes
SURE, OPEN = 1, 4  # tokens of messages where low bits always win, and by turns
CPU = torch.device("cpu")
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
    family = rounds.Family(make_calls, KINDS, rounds.Place(dist.group.WORLD, {}, CPU))
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
def test_native_is_called_once_where_calls_are_long(rank):
    first, second = natives(NATIVE, 2)
    calls = dict.fromkeys(
        [first, second, *CASES[1:]], lambda x: time.sleep(0.005 * (len(x) > SURE))
    )
    family = rounds.Family(lambda: calls, KINDS, rounds.Place(dist.group.WORLD, {}, CPU))
    with patch.object(rounds, "_LONG", 0.005):
        family.measure([SURE, OPEN, 4 * OPEN], 1.0, 8, all_sizes=True)
    found = family.timings
    assert found.sizes() == [ROW * tokens for tokens in (SURE, OPEN, 4 * OPEN)]
    assert list(found.times[second]) == [ROW * SURE]


@pytest.mark.parametrize(("device", "computes"), [("cpu", True), ("meta", False)])
def test_a_rank_computes_before_a_call_on_a_cpu_only(monkeypatch, device, computes):
    calls = []
    monkeypatch.setattr(torch, "mm", lambda *given: calls.append(given))
    rounds.compute(torch.device(device))
    assert bool(calls) == computes
