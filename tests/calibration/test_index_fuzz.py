"""Wrong indexes: a line, or no harm (`index_mutations`; a long run: `fuzz_indexes.py`)."""

import resource

import index_mutations
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("index") / "lowbit"
    index_mutations.make(directory)
    return directory


def test_the_index_itself_is_accepted(base):
    assert index_mutations.outcome(base) == "accepted"


def test_wrong_indexes_are_refused_or_harmless(base):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=40, deadline=10_000)
    @given(st.integers(0, 2**32))
    def check(seed):
        index_mutations.run(base, base.with_name("wrong"), seed)

    check()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000, f"{grown / 1e3:.0f} MB"
