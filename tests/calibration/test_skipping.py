"""Which sync points a recipe with --skip leaves out."""

from itertools import combinations
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lowbit.calibration.plan import SKIP, Cost, Option
from megatron_lowbit.calibration.skipping import choose_skipped
from megatron_lowbit.errors import LowbitError


def _points(chunks: list[int], apart: set[int] = frozenset()) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(layer=n, name="fc2", chunk=chunk, apart="a gate" * (n in apart))
        for n, chunk in enumerate(chunks)
    ]


def _options(costs: list[float]) -> dict:
    return {(n, "fc2"): [Option(SKIP, 0.0, Cost(cost))] for n, cost in enumerate(costs)}


def _allowed(chosen: tuple[int, ...], chunks: list[int]) -> bool:
    """Never two neighbours, never an end."""
    for chunk in set(chunks):
        chain = [n for n, of in enumerate(chunks) if of == chunk]
        places = [chain.index(n) for n in chosen if n in chain]
        if len(chain) - 1 in places or any(place + 1 in places for place in places):
            return False
    return True


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_cheapest_that_are_allowed(data):
    chunks = sorted(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=8)))
    costs = [data.draw(st.integers(1, 99)) for _ in chunks]
    for count in range(len(chunks) + 1):
        sets = [c for c in combinations(range(len(chunks)), count) if _allowed(c, chunks)]
        try:
            chosen = choose_skipped(_options(costs), _points(chunks), count)
        except LowbitError as error:
            assert not sets, error
            continue
        least = min(sum(costs[n] for n in one) for one in sets)
        assert sum(costs[n] for n, _ in chosen) == least
        assert _allowed(tuple(n for n, _ in chosen), chunks)


def test_what_is_too_many_is_said_with_the_reason():
    with pytest.raises(LowbitError, match=r"--skip 2: 0 of 3 sync points can .*\(a gate\)"):
        choose_skipped(_options([1, 2, 3]), _points([0, 0, 0], apart={0, 1}), 2)
