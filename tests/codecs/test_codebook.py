"""Lloyd-Max codebooks: optimal by their own condition, and as good as theory says."""

import math

import pytest
import torch

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.codecs import codebook
from megatron_lowbit.codecs.rotated_hybrid import RotatedHybrid

CPU = torch.device("cpu")


def _pdf(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


@pytest.mark.parametrize("bits", RotatedHybrid.supported_bits)
def test_each_level_is_the_mean_of_its_cell(bits):
    levels = codebook.levels(bits, CPU).double().tolist()
    edges = [-40.0, *codebook.thresholds(bits, CPU).double().tolist(), 40.0]
    assert len(levels) == 2**bits
    for level, low, high in zip(levels, edges[:-1], edges[1:], strict=True):
        mean = (_pdf(low) - _pdf(high)) / (_cdf(high) - _cdf(low))
        assert abs(level - mean) < 1e-6


@pytest.mark.parametrize(
    ("bits", "decibel"), [(2, 9.30), (3, 14.62), (4, 20.22), (5, 26.01), (6, 31.91)]
)
def test_gaussian_sqnr(bits, decibel):
    values = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    got = sqnr(values, codebook.dequantize(codebook.quantize(values, bits), bits))
    assert got == pytest.approx(decibel, abs=0.03)  # 3 sigma of a million samples


def test_nearest_level_and_extremes():
    levels = codebook.levels(4, CPU)
    assert torch.equal(codebook.quantize(levels, 4), torch.arange(16, dtype=torch.uint8))
    extremes = torch.tensor([-torch.inf, torch.inf, torch.nan])
    codes = codebook.quantize(extremes, 4)
    assert codes[:2].tolist() == [0, 15]
    assert 0 <= codes[2] <= 15
