"""Statistics that no data can give are refused; whatever data there is, its own are not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lowbit.calibration.statistics import RunningStatistics, summarize
from megatron_lowbit.calibration.validation.impossible import impossible
from megatron_lowbit.calibration.validation.index_schema import Corpus

HIDDEN = 4


def _collect(sequences: torch.Tensor) -> list[torch.Tensor]:
    """Minimum, maximum, mean and second moment of ``[sequences, tokens, hidden]``."""
    statistics = RunningStatistics(1, HIDDEN)
    for sequence in sequences:
        statistics.fold(summarize(sequence)[None], len(sequence))
    return list(statistics.result()[0])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 2, 7, 100, 300]),
    st.sampled_from([1, 3, 32]),
    st.sampled_from([1e-40, 1e-22, 1e-19, 1e-6, 1.0, 1e4, 1e10]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(
        ["even", "constant", "shifted", "one large", "a late one", "tails", "mostly 0"]
    ),
)
def test_whatever_the_data_is_it_is_possible(seed, sequences, tokens, scale, dtype, kind):
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences, tokens, HIDDEN)
    data = torch.randn(shape, generator=generator)
    if kind == "constant":
        data = data[:1, :1].expand(shape)
    elif kind == "shifted":
        data = data * 1e-4 + 1
    elif kind == "one large":
        data[seed % sequences, seed % tokens] *= 1e3
    elif kind == "a late one":
        data *= torch.zeros(sequences, 1, 1)
        data[-1] += 1
    elif kind == "tails":
        data = data * torch.randn(shape, generator=generator).mul(3).exp().clamp_max(100)
    elif kind == "mostly 0":
        data = data * (torch.rand(sequences, 1, 1, generator=generator) < 0.05)
    values = _collect((data * scale).to(dtype))
    if values[3].max() > 1e28:
        return
    for corpus in (Corpus(sequences=sequences, seq_length=tokens), Corpus()):
        assert impossible(*values, corpus) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: 3.0, 1: 2.0}, "minimum is above the maximum"),
        ({2: 1.5, 3: 2.0}, "second moment is below the mean's square"),
        ({3: -1.0}, "second moment is negative"),
        ({0: 9.0, 1: 9.5, 2: 0.0, 3: 1.0}, "mean is outside the range"),
        ({0: -9.5, 1: -9.0, 2: 0.0, 3: 1.0}, "mean is outside the range"),
        ({0: 0.5, 1: 0.6, 2: 0.0, 3: 0.0}, "mean is outside the range"),
        ({1: 1e3}, "range is beyond what the second moment allows"),
        ({0: -1e3}, "range is beyond what the second moment allows"),
        ({3: 1e38}, "second moment 1e\\+38 is beyond"),
        ({1: 1e20}, "maximum 1e\\+20 is beyond"),
    ],
)
def test_what_no_data_can_give(change, message):
    generator = torch.Generator().manual_seed(0)
    values = _collect(torch.randn(50, 16, HIDDEN, generator=generator))
    for number, value in change.items():
        values[number][2] = value
    import re

    assert re.search(message, impossible(*values, Corpus(sequences=50, seq_length=16)))
