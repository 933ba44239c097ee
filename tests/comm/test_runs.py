"""What a round of one message size calls, and which of its calls are timed."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from given_times import GivenTimes
from ranks import on_each_rank

from megatron_lowbit.comm.policy import runs
from megatron_lowbit.comm.policy.timings import Case

CPU = torch.device("cpu")


def make_calls(names: list[str]) -> tuple[runs.Calls, list[str]]:
    """By a letter for the collective and a digit for the kind; and what was called so far. Each
    call takes as many seconds as were made before it."""
    done: list[str] = []

    def call(_, name):
        GivenTimes.taken = float(len(done))
        done.append(name)

    return {Case(name[1:], False, name[0]): partial(call, name=name) for name in names}, done


def run_of(seconds: float, kinds: int, most: int = 8) -> tuple[str, list[list[float]]]:
    """What a run calls whose calls take so many seconds, and the clocks that count, by kind."""
    calls, done = make_calls([str(kind) for kind in range(kinds)])
    run = runs.Run(calls, most)
    run.fit(seconds)
    with patch.object(runs, "Clock", GivenTimes):
        clocks = run.make(torch.zeros(1), torch.zeros(1))
    return "".join(done), [[clock.seconds() for clock in of_kind] for of_kind in clocks]


@pytest.mark.parametrize(
    ("ms", "kinds", "called"),
    [
        (0.1, 1, "0" * 8),
        (1.5, 2, "01" * 4),
        (1.5, 3, "12" + "012" * 2),
        (1.5, 7, "56" + "0123456"),
        (3.5, 1, "0" * 4),
        (7.0, 1, "0" * 2),
        (7.0, 2, "01"),
        (12.0, 1, "0"),
        (9999.0, 3, "012"),
    ],
)
def test_a_run_has_every_kind_as_often(ms, kinds, called):
    """As many calls as take 12 ms, eight at the most, or one of each kind."""
    done, timed = run_of(ms / 1000, kinds)
    assert done == called
    assert len({len(of_kind) for of_kind in timed}) == 1


def test_the_first_calls_of_a_run_are_not_timed():
    """A quarter of them, three at the most; none of fewer than four calls."""
    assert run_of(0.001, 1)[1] == [[2, 3, 4, 5, 6, 7]]
    assert run_of(0.001, 2)[1] == [[2, 4, 6], [3, 5, 7]]
    assert run_of(0.0035, 1)[1] == [[1, 2, 3]]
    assert run_of(0.007, 1)[1] == [[0, 1]]
    for most in range(12, 100):
        assert run_of(0.001, 1, most)[1] == [list(range(3, most))]


@on_each_rank(2)
def test_rounds_go_forwards_and_backwards_by_turns(rank):
    """And the kinds of a pass always in order."""
    for kinds, expected in (("0", "a0b0b0a0a0b0"), ("01", "a0a1b0b1b0b1a0a1a0a1b0b1")):
        calls, done = make_calls([name + kind for name in "ab" for kind in kinds])
        size = runs.Size(1, 64, calls, runs.Place(None, {}, CPU, calls=1))
        for _ in range(3):
            size.take(1)
        assert "".join(done) == expected, done


@on_each_rank(2)
def test_times_are_kept_by_case(rank):
    """Each run is as long as its own calls need, by the rounds before; whatever their order."""
    seconds = {"a0": 0.010, "b0": 0.001, "b1": 0.003}
    done = []

    def call(_, name):
        GivenTimes.taken = seconds[name]
        done.append(name)

    calls = {Case(name[1:], False, name[0]): partial(call, name=name) for name in seconds}
    size = runs.Size(1, 64, calls, runs.Place(None, {}, CPU, calls=8))
    with patch.object(runs, "Clock", GivenTimes):
        size.take(1, keep=False)
        del done[:]
        size.take(2)
    assert (done.count("a0"), done.count("b0"), done.count("b1")) == (4, 6, 8)
    assert size.rounds == 2
    for case, name in zip(calls, seconds, strict=True):
        assert size.found[case] == pytest.approx([1000 * seconds[name]] * 2)
    assert size.once == pytest.approx(0.014 + 3 * 0.0005)


@pytest.mark.parametrize(("device", "computes"), [("cpu", True), ("meta", False)])
def test_a_rank_computes_before_a_call_on_a_cpu_only(monkeypatch, device, computes):
    calls = []
    monkeypatch.setattr(torch, "mm", lambda *given: calls.append(given))
    runs.compute(torch.device(device))
    assert bool(calls) == computes
