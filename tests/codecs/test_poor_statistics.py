"""Codecs of statistics that say little: weights are bounded, and means that are not believed."""

import math

import pytest
import torch
from cases import reference_sum

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.calibration.index import MOST_MEAN, SyncPointRecord, mean_energy, trusted
from megatron_lowbit.codecs import Statistics, get_codec
from megatron_lowbit.codecs.variance import MOST_COST

HIDDEN, RANKS = 256, 2
EVEN = torch.randn(RANKS, 64, HIDDEN, generator=torch.Generator().manual_seed(0))


VARIANCES = {
    "half collapsed": torch.arange(HIDDEN) % 2.0,
    "one left": torch.where(torch.arange(HIDDEN) == 0, 1.0, 1e-30),
    "all zero": torch.zeros(HIDDEN),
    "spread": 10.0 ** torch.linspace(-12, 12, HIDDEN),
    "huge": torch.full((HIDDEN,), 1e28),
}


def _sqnr(codec, tables) -> float:
    return sqnr(EVEN.sum(dim=0), reference_sum(codec, EVEN, tables))


@pytest.mark.parametrize("bf16_features", [0, 3])
@pytest.mark.parametrize("name", ["shaped-hybrid", "scaled-hybrid"])
@pytest.mark.parametrize("kind", VARIANCES)
def test_weights_never_cost_more_than_12_db(name, kind, bf16_features):
    variance = VARIANCES[kind].expand(RANKS, HIDDEN)
    codec, plain = get_codec(name), get_codec("rotated-hybrid")
    tables = codec.tables(
        HIDDEN,
        bf16_index=torch.arange(bf16_features),
        statistics=Statistics(variance=variance),
    )
    expected = _sqnr(plain, plain.tables(HIDDEN)) - 10 * math.log10(MOST_COST)
    assert _sqnr(codec, tables) > expected - 1


def test_weights_of_ordinary_variances_are_as_they_were():
    """Up to the bound nothing changes, to the last bit."""
    generator = torch.Generator().manual_seed(1)
    variance = torch.rand(RANKS, HIDDEN, generator=generator) + 0.05
    variance[:, 7] = 1e4
    total = variance.sum(dim=0)
    share = (total / total.mean()).clamp_min(1e-6)
    tables = get_codec("shaped-hybrid").tables(
        HIDDEN, bf16_index=torch.tensor([7]), statistics=Statistics(variance=variance)
    )
    plain = get_codec("rotated-hybrid").tables(HIDDEN, bf16_index=torch.tensor([7]))
    assert torch.equal(tables.encode_scale, plain.encode_scale * share**-0.25)


def _record(mean: float, deviation: float) -> SyncPointRecord:
    means = torch.full((RANKS, HIDDEN), mean)
    squares = means.square() + deviation**2
    of_sum = (RANKS * means[0], RANKS * means[0], RANKS * means[0], squares[0] * RANKS)
    return SyncPointRecord(torch.empty(0, dtype=torch.int32), means, means, means, squares, *of_sum)


def test_means_are_believed_where_values_vary():
    record = _record(3.0, 1.0)
    assert torch.equal(record.statistics(RANKS).mean, record.mean)


@pytest.mark.parametrize(("deviation", "most"), [(0.0, 0.0), (1e-3, 1e-2), (0.01, 0.1)])
def test_means_are_left_out_where_nothing_varied(deviation, most):
    """The text was one word: what all its tokens have in common is no other text's mean."""
    mean = _record(1.0, deviation).statistics(RANKS).mean
    assert (mean >= 0).all() and mean.max() <= most


def test_less_is_subtracted_the_less_there_is_to_rest_on():
    variance = torch.ones(1, 4)
    for times in (2.0, 30.0):
        mean = torch.full((1, 4), math.sqrt(MOST_MEAN * times))
        left = trusted(mean, variance)
        assert torch.allclose(left, mean / times)
        assert mean_energy(left, variance) <= MOST_MEAN
