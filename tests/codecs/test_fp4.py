"""MXFP4 and NVFP4: rounding at every midpoint, scales, gguf's independent code."""

import pytest
import torch
from cases import sample, through

from megatron_lowbit.codecs import get_codec

LEVELS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
NAMES = ["mxfp4", "nvfp4"]


def with_scale_one(name, values):
    """`values`, ``[n]``, in groups whose scales are all 1."""
    if name == "mxfp4":  # 4 has the exponent 2
        groups = torch.nn.functional.pad(values, (0, -len(values) % 31)).view(-1, 31)
        return torch.nn.functional.pad(groups, (1, 0), value=4.0)
    groups = torch.nn.functional.pad(values, (0, -len(values) % 15)).view(-1, 15)
    groups = torch.nn.functional.pad(groups, (1, 0), value=6.0)
    token = torch.full((len(groups), 16), 6.0 * 448)  # a group that makes the token's scale 1
    return torch.cat([token, groups], dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_exact_and_ties_go_to_the_even_code(name):
    levels = torch.tensor(LEVELS)
    middles = (levels[1:] + levels[:-1]) / 2
    even = torch.where(torch.arange(7) % 2 == 0, levels[:-1], levels[1:])
    beside = [middles.nextafter(levels[:-1]), middles.nextafter(levels[1:])]
    values = torch.cat([levels, middles, *beside, torch.tensor([5.999, 6.0])])
    expected = torch.cat([levels, even, levels[:-1], levels[1:], torch.tensor([6.0, 6.0])])
    for sign in (1, -1):
        rows = with_scale_one(name, sign * values)
        assert torch.equal(through(get_codec(name), rows), with_scale_one(name, sign * expected))


@pytest.mark.parametrize(
    ("absmax", "byte"),
    [
        *((4.0, 127), (6.0, 127), (7.99, 127), (8.0, 128), (3.99, 126), (1.0, 125), (-1.0, 125)),
        *((0.0, 0), (2.0**-126, 0), (2.0**-124, 1), (2.0**-149, 0), (2.0**127, 252)),
        *((torch.nan, 255), (torch.inf, 255), (-torch.inf, 255)),
    ],
)
def test_mxfp4_scale_is_the_exponent_of_the_largest_less_two(absmax, byte):
    codec = get_codec("mxfp4")
    payload = codec.encode(torch.tensor([[0.0, absmax]]), codec.tables(2))
    assert payload[0, 1] == byte


def test_nvfp4_example_by_hand():
    """Groups with absmax 2688 and 6: scales 448 and 1 of a token scale of 1."""
    codec = get_codec("nvfp4")
    values = torch.zeros(1, 20)
    values[0, :3] = torch.tensor([2688.0, -448.0, 112.0])
    values[0, 16:] = torch.tensor([-6.0, 0.75, 5.0, 1.3])
    payload = codec.encode(values, codec.tables(20))
    first = [7 | 10 << 4, *[0] * 7]  # 0.25 steps are a tie, to zero
    assert payload.tolist() == [
        [*first, 15 | 2 << 4, 6 | 3 << 4, *[0, 0], *[0x00, 0x00, 0x80, 0x3F], *[0x7E, 0x38]]
    ]
    expected = torch.zeros(1, 20)
    expected[0, :2] = torch.tensor([2688.0, -448.0])
    expected[0, 16:] = torch.tensor([-6.0, 1.0, 4.0, 1.5])
    assert torch.equal(through(codec, values), expected)


def test_nvfp4_scale_is_of_the_token_alone_and_of_its_finite_groups():
    codec, values = get_codec("nvfp4"), sample("normal", (4, 64), 0)
    values[1] *= 1000
    values[2, 3], values[2, 5] = torch.nan, 1e6  # a group that counts for nothing
    scales = codec.encode(values, codec.tables(64))[:, 32:36].contiguous().view(torch.float32)
    expected = values.abs().amax(dim=1, keepdim=True) / 2688
    expected[2] = values[2, 16:].abs().max() / 2688
    assert torch.equal(scales, expected)


def test_mxfp4_is_ggufs():
    """An implementation that others keep: its bytes (in its order) and what they stand for."""
    quants = pytest.importorskip("gguf.quants")
    values = sample("heavy-tailed", (64, 320), 0)
    codec = get_codec("mxfp4")
    payload = codec.encode(values, codec.tables(320))
    blocks = quants.MXFP4.quantize_blocks(values.view(-1, 32).numpy())
    assert torch.equal(payload[:, 160:].flatten(), torch.from_numpy(blocks[:, 0]).flatten())
    theirs = torch.from_numpy(quants.MXFP4.dequantize_blocks(blocks)).view(64, 320)
    assert torch.equal(through(codec, values), theirs)


def test_nvfp4_means_what_gguf_reads():
    """gguf does not write it, and has no token scale: that is 1 here."""
    quants = pytest.importorskip("gguf.quants")
    values = sample("heavy-tailed", (64, 64), 0)
    values[:, 0] = 2688.0
    codec = get_codec("nvfp4")
    payload = codec.encode(values, codec.tables(64))
    codes = torch.stack([payload[:, :32] & 15, payload[:, :32] >> 4], dim=-1).view(64, 4, 2, 8)
    theirs = torch.cat([payload[:, 36:], (codes[:, :, 0] | codes[:, :, 1] << 4).flatten(1)], dim=1)
    read = torch.from_numpy(quants.NVFP4.dequantize_blocks(theirs.numpy()))
    assert torch.equal(through(codec, values), read)
