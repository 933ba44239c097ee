"""The contract of every collective with every codec, on 1 to 8 ranks over Gloo, case by case.

Hypothesis draws the cases (shapes, dtypes, bits, chunk sizes); a process group runs many of them,
since starting it is what takes time. Every result must equal, bit for bit, what one process
computes from the same partials.
"""

import pytest
from cases import DTYPES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ranks import on_each_rank
from worker import Case, can_run, check

from megatron_lowbit.codecs import get_codec

# A collective knows nothing of a codec but its payloads, so one for each way to make them is enough
# here (tests/codecs has all): plain values; ranges by rank, and of the sum; a rotation, at two
# widths of packing; the same with means that belong to ranks; a peer's with scales of groups, and
# one with scales of two levels.
CODECS = [
    ("bf16", 16),
    ("static-hybrid", 4),
    ("rotated-hybrid", 4),
    ("rotated-hybrid", 3),
    ("shaped-hybrid", 4),
    ("int4-g32", 4),
    ("nvfp4", 4),
]
COLLECTIVES = ["one-shot", "two-shot", "hierarchical", "reduce-scatter", "all-gather"]
# Fewer than ranks, not divisible, several leading axes, odd sizes, several chunks.
SHAPES = [(0, 64), (1, 64), (2, 33), (3, 1), (7, 96), (4, 2, 48), (40, 64)]


def _second_bits(name: str) -> list[int]:
    return [bits for bits in get_codec(name).supported_bits if bits in (16, 8, 6, 4)]


@st.composite
def case_lists(draw, ranks: int) -> list[Case]:
    """A case of every codec and collective that `ranks` can run, the rest drawn."""
    cases = []
    for name, bits in CODECS:
        for collective in COLLECTIVES:
            if not can_run(collective, ranks):
                continue
            shape = draw(st.sampled_from(SHAPES))
            if collective == "reduce-scatter":
                shape = (shape[0] * ranks, *shape[1:])
            case = Case(
                codec=name,
                bits=(bits, draw(st.sampled_from(_second_bits(name)))),
                collective=collective,
                shape=shape,
                dtype=draw(st.sampled_from(DTYPES)),
                kept=draw(st.integers(0, 2)),
                chunk_values=draw(st.sampled_from([1, 64, 1 << 19])),
                seed=draw(st.integers(0, 99)),
                low_bit_inside=draw(st.booleans()),
            )
            cases.append(case)
    return cases


# As many as matter in unit; the rest are as slow as they are many.
RANKS = [1, 2, 3, 4, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (5, 6, 7, 8))]


@pytest.fixture
def cases(ranks) -> list[Case]:
    """Three lists of them."""
    drawn = []

    @settings(
        max_examples=3,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case_lists(ranks))
    def collect(cases):
        drawn.extend(cases)

    collect()
    return drawn


@on_each_rank(*RANKS)
def test_equals_one_process_bit_for_bit_on_every_rank(rank, cases):
    for case in cases:
        check(rank, case)
