"""Running statistics against their definitions, computed over the whole corpus at once."""

import torch

from megatron_lowbit.calibration.statistics import MOMENTUM, RunningStatistics, summarize


def _sequences(count: int) -> torch.Tensor:
    return torch.randn(count, 7, 2, 5, generator=torch.Generator().manual_seed(0))


def test_moving_average_is_the_paper_s():
    sequences = _sequences(4)
    statistics = RunningStatistics(points=1, hidden=5)
    for sequence in sequences:
        statistics.fold(summarize(sequence)[None], tokens=14)
    expected = sequences[0].reshape(-1, 5).amin(dim=0).double()
    for sequence in sequences[1:]:
        low = sequence.reshape(-1, 5).amin(dim=0)
        expected = (1 - MOMENTUM) * expected + MOMENTUM * low
    torch.testing.assert_close(statistics.result()[0, 0].double(), expected, rtol=1e-6, atol=0)


def test_mean_and_second_moment_are_over_all_tokens():
    sequences = _sequences(6)
    statistics = RunningStatistics(points=1, hidden=5)
    for sequence in sequences:
        statistics.fold(summarize(sequence.bfloat16())[None], tokens=14)
    tokens = sequences.bfloat16().double().reshape(-1, 5)
    result = statistics.result()[0].double()
    torch.testing.assert_close(result[2], tokens.mean(dim=0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(result[3], tokens.square().mean(dim=0), rtol=1e-5, atol=0)
    assert (statistics.sequences, statistics.tokens) == (6, 84)
