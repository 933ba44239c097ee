"""SDP4Bit with and without its rotation: what the rotation is. Its bytes: test_grouped.py."""

import pytest
import torch
from cases import sample, through

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.codecs.peers.sdp4bit import rotate, turn_back


def hadamard_matrix(size):
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("hidden", [7, 96, 576])
def test_it_is_the_plain_one_of_rotated_values(hidden, bits):
    """Sums are taken, in rank order, before they are turned back."""
    codec, plain = get_codec("sdp4bit", bits=bits), get_codec("sdp4bit-plain", bits=bits)
    partials = [sample("heavy-tailed", (5, hidden), seed) * 10.0**seed for seed in range(4)]
    tables = codec.tables(hidden)
    payloads = torch.stack([codec.encode(p, tables) for p in partials])
    assert torch.equal(payloads, torch.stack([plain.encode(rotate(p), tables) for p in partials]))
    total = codec.decode_sum(payloads, tables)
    assert torch.equal(total, turn_back(plain.decode_sum(payloads, tables)))


def test_the_rotation_is_the_matrix_of_32():
    values = sample("normal", (3, 96), 0).round(decimals=0)  # no addition of integers rounds
    expected = (values.view(3, 3, 32) @ hadamard_matrix(32)).view(3, 96)
    assert torch.equal(turn_back(values), expected)
    assert torch.equal(rotate(values), expected / 32)


def test_what_is_left_of_a_row_has_smaller_blocks():
    values = sample("normal", (3, 39), 0).round(decimals=0)
    parts = values.split([32, 4, 2, 1], dim=1)
    expected = torch.cat([part @ hadamard_matrix(part.shape[1]) for part in parts], dim=1)
    assert torch.equal(turn_back(values), expected)
    assert torch.equal(turn_back(rotate(values)), values)


def test_largest_values_do_not_overflow():
    values = torch.full((1, 64), torch.finfo(torch.bfloat16).max)
    got = through(get_codec("sdp4bit"), values)
    torch.testing.assert_close(got, values, rtol=1e-6, atol=0)


def test_the_rotation_pays_where_few_values_are_large():
    """Heavy tails; a Gaussian has nothing to gain (measured 19.0 and 13.1, 18.7 and 18.7 dB)."""
    quality = {}
    for kind in ("heavy-tailed", "normal"):
        values = sample(kind, (512, 576), 0)
        for name in ("sdp4bit", "sdp4bit-plain"):
            quality[kind, name] = sqnr(values, through(get_codec(name), values))
    gain = {kind: quality[kind, "sdp4bit"] - quality[kind, "sdp4bit-plain"] for kind, _ in quality}
    assert gain["heavy-tailed"] > 5, quality
    assert abs(gain["normal"]) < 0.2, quality
