"""The rotation: its own inverse up to the block size, norm kept, signs fixed for ever."""

import hashlib

import numpy as np
import pytest
import torch

from megatron_lowbit.codecs import rotation

SIGNS = [-1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, -1.0]
SIGNS_4096 = "885d5c43e58be77170f4f8f64c372fafec6ab8f26d61d409d1841cbfed1cbb55"


@pytest.mark.parametrize(
    ("hidden", "block"), [(576, 64), (4096, 4096), (5120, 1024), (48, 16), (33, 1), (1, 1)]
)
def test_block_is_the_largest_power_of_two_that_divides(hidden, block):
    assert rotation.block_size(hidden) == block


@pytest.mark.parametrize("hidden", [1, 2, 33, 48, 576, 4096])
def test_transform_is_its_own_inverse(hidden):
    # Small integers: every addition is exact, so equality is exact.
    values = torch.randint(-8, 8, (3, hidden)).float()
    twice = rotation.hadamard(rotation.hadamard(values))
    assert torch.equal(twice, rotation.block_size(hidden) * values)


def test_transform_is_the_sylvester_matrix():
    rows = rotation.hadamard(torch.eye(4))
    expected = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert rows.tolist() == expected


def test_an_odd_size_is_not_rotated():
    values = torch.randn(2, 33)
    assert torch.equal(rotation.hadamard(values), values)


def test_signs_never_change():
    """An index or a payload of today must mean the same in every later release."""
    signs = rotation.signs(4096)
    assert set(signs.tolist()) == {1.0, -1.0}
    assert abs(signs.sum()) < 4 * 4096**0.5
    assert signs[:8].tolist() == SIGNS
    digest = hashlib.sha256(bytes((signs > 0).to(torch.uint8).tolist())).hexdigest()
    assert digest == SIGNS_4096
    assert torch.equal(rotation.signs(64), signs[:64])


@pytest.mark.parametrize("hidden", [1, 33, 576])
def test_sum_of_squares(hidden):
    values = torch.randint(-8, 8, (3, hidden)).float()
    assert torch.equal(rotation.sum_of_squares(values)[:, 0], values.square().sum(dim=1))


def test_sum_of_squares_is_a_pairwise_tree():
    values = torch.tensor([[1e4, 1.0, 1e-4]])
    squares = values.square()[0]
    expected = (squares[0] + squares[2]) + squares[1]
    assert rotation.sum_of_squares(values).item() == expected.item()


def test_root_mean_is_correctly_rounded():
    totals = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 100
    for count, plus in ((1, 0.0), (96, 1e-5)):
        exact = np.sqrt(totals.numpy() / np.float32(count) + np.float32(plus))
        assert torch.equal(rotation.root_mean(totals, count, plus=plus), torch.from_numpy(exact))
