"""What the peers' formats share: bytes, groups, non-finite values, saturation; the table of peers.

And exact small examples of those with one scale per group, FP8 against torch's cast.
"""

import re

import pytest
import torch
from cases import sample, through

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.codecs import CODECS, get_codec
from megatron_lowbit.codecs.peers.group_frame import Grouped
from megatron_lowbit.codecs.peers.systems import PEERS

NAMES = list(PEERS)
GROUPS = {name: CODECS[name].group for name in NAMES}


@pytest.mark.parametrize(
    ("name", "bits", "expected"),
    [
        ("int4-g32", 8, 8.5),
        ("int4-g32", 6, 6.5),
        ("int4-g32", 4, 4.5),
        ("int4-g32", 3, 3.5),
        ("int4-g16", 6, 6.5),
        ("int4-g16", 5, 5.5),
        ("int4-g16", 4, 4.5),
        ("int4-g32-asym", 4, 5),
        ("int4-g128-asym", 4, 4.25),
        ("int4-g128-asym", 3, 3.25),
        ("spike-g32", 4, 6.5),
        ("spike-g32", 3, 5.5),
        ("spike-g32", 2, 4.5),
        ("mxfp4", 4, 4.25),
        ("nvfp4", 4, 4.5 + 32 / 4096),
        ("int8-token", 8, 8 + 32 / 4096),
        ("fp8-g256", 8, 8 + 32 / 256),
        ("int8-g32", 8, 8.5),
        ("sdp4bit", 4, 4.25),
        ("sdp4bit", 8, 8.25),
        ("sdp4bit-plain", 4, 4.25),
    ],
)
def test_bits_per_value_at_hidden_4096(name, bits, expected):
    codec, values = get_codec(name, bits=bits), sample("normal", (2, 4096), 0)
    assert 8 * codec.encode(values, codec.tables(4096)).numel() / values.numel() == expected


def nibbles(*codes: int) -> list[int]:
    """The bytes of codes of 4 bits."""
    return [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]


SIGNED = [4.0, 1.0, -1.25, 0.0, -3.5, -4.0]
# By name: values, the row by hand, and what it stands for.
BY_HAND = {
    # -8 steps at the largest magnitude, which is positive here, so the scale is negative. It is
    # BF16 0.5: 8 and -8 steps tie, and the negative one takes code 0 (-8 steps), 4.0 is one level
    # short. 2.5 steps are rounded to the even 2. A zero pads.
    "int4-g32": (
        SIGNED,
        [*nibbles(15, 10, 6, 8, 1, 0), 0, 0x00, 0x3F],
        [3.5, 1.0, -1.0, 0.0, -3.5, -4.0],
    ),
    # The same with -4 in E4M3, at -8 steps.
    "int4-g16": (SIGNED, [*nibbles(15, 10, 6, 8, 1, 0), 0xC8], [3.5, 1.0, -1.0, 0.0, -3.5, -4.0]),
    # 7 steps at the largest magnitude: of -3.5 the fp32 scale is 0.5; 2.5 steps become 2.
    "sdp4bit-plain": (
        [3.5, 1.0, -1.25, 0.0, -3.5, -3.0],
        [*nibbles(15, 10, 6, 8, 1, 2), 0, 0x00, 0x00, 0x00, 0x3F],
        [3.5, 1.0, -1.0, 0.0, -3.5, -3.0],
    ),
    # From -1 to 6.5 in 15 steps of 0.5; 2.5 and 2.2 steps are rounded to 2. Then a zero that pads,
    # BF16 0.5 and BF16 -1.
    "int4-g32-asym": (
        [-1.0, 2.0, 0.1, 6.5, 0.25, 4.6],
        [*nibbles(0, 6, 2, 15, 2, 11), 0, 0x00, 0x3F, 0x80, 0xBF],
        [-1.0, 2.0, 0.0, 6.5, 0.0, 4.5],
    ),
    # 100 and -50 apart, with the code of one of the others. Those go from 1 to 4 in three steps of
    # 2 bits; 1.5 steps are rounded to 2. Then scale, zero, both spikes in BF16 and their places.
    "spike-g32": (
        [100.0, 1.0, 2.5, 4.0, -50.0, 1.6],
        [2 << 4 | 3 << 6, 1 << 2, 0x80, 0x3F, 0x80, 0x3F, 0xC8, 0x42, 0x48, 0xC2, 0, 4],
        [100.0, 1.0, 3.0, 4.0, -50.0, 2.0],
    ),
    # What is above 6 saturates; the exponent of the scale is 127 - 127.
    "mxfp4": (
        [7.9, -6.0, 0.25, 0.75, -2.5, -0.2, 3.5],
        [*nibbles(7, 15, 0, 2, 12, 8, 6, 0), 127],
        [6.0, -6.0, 0.0, 1.0, -2.0, 0.0, 4.0],
    ),
    # The scale is fp32 2.0, aligned.
    "int8-token": (
        [254.0, -254.0, 1.0, 3.0, -7.2],
        [255, 1, 128, 130, 124, 0, 0, 0, 0x00, 0x00, 0x00, 0x40],
        [254.0, -254.0, 0.0, 4.0, -8.0],
    ),
    # The same in fp16.
    "int8-g32": (
        [254.0, -254.0, 1.0, 3.0, -7.2],
        [255, 1, 128, 130, 124, 0, 0x00, 0x40],
        [254.0, -254.0, 0.0, 4.0, -8.0],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_examples_by_hand(name):
    values, row, decoded = BY_HAND[name]
    codec, values = get_codec(name), torch.tensor([values])
    assert codec.encode(values, codec.tables(values.shape[1])).tolist() == [row]
    assert through(codec, values).tolist() == [decoded]


@pytest.mark.parametrize("name", ["int4-g32", "int4-g16"])
def test_the_scale_has_the_sign_that_the_largest_value_needs(name):
    got = through(get_codec(name), -2 * torch.tensor([SIGNED]))
    assert got.tolist() == [[-8.0, -2.0, 2.0, 0.0, 7.0, 7.0]]


def test_int4_takes_the_wire_scale_to_encode():
    """9/8 * (1 + 2**-9) rounds down to 9/8 in BF16; of the exact scale it would be 5.49 steps."""
    values = torch.tensor([[-9 * (1 + 2**-9), 5.5 * 1.125]])
    assert through(get_codec("int4-g32"), values).tolist() == [[-9.0, 6 * 1.125]]


def test_aiters_e4m3_is_ocps_without_subnormal_numbers():
    codes = torch.arange(8, 0x7F, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    values = torch.cat([2**-7 * (1 + torch.arange(1, 8) / 8), values])
    values = torch.cat([values, -values])[:, None]
    codec = get_codec("int4-g16")
    payload = codec.encode(values, codec.tables(1))
    codes = torch.arange(1, 0x7F)
    assert payload[:, 1].tolist() == [*codes.tolist(), *(codes + 0x80).tolist()]
    assert torch.equal(through(codec, values), values)


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        *((1 + 1 / 16, 1 + 1 / 8), (-1 - 1 / 16, -1 - 1 / 8)),  # halves are rounded up
        *((1.5 * 2**-9, 1.5 * 2**-7), (2.0**-7, 1.125 * 2**-7), (-(2.0**-7), -(2.0**-7))),
        *((460.0, 448.0), (-1e30, -448.0)),
    ],
)
def test_aiters_rounding_of_the_largest_value(value, sent):
    codec = get_codec("int4-g16")
    assert codec._step(codec._to_wire(torch.tensor([value]))).item() == sent / -8


@pytest.mark.parametrize(("name", "published"), [("int4-g16", 19.2), ("int4-g32", 18.3)])
def test_two_shot_sqnr_is_what_aiter_measures(name, published):
    """In dB at 8 ranks, of its own kernel and of QuickReduce (ROCm/aiter pull request 4970)."""
    codec, partials = get_codec(name), [sample("normal", (256, 1024), seed) for seed in range(8)]
    tables = codec.tables(1024)
    of_sum = codec.reduce_encode(torch.stack([codec.encode(p, tables) for p in partials]), tables)
    got = sqnr(torch.stack(partials).double().sum(dim=0), codec.decode_sum(of_sum[None], tables))
    assert got == pytest.approx(published, abs=0.15)


def test_int8_in_groups_is_ggmls_q8_0():
    """The scales of ggml's own package, and its codes but where the scale's rounding tells."""
    gguf = pytest.importorskip("gguf")
    codec, values = get_codec("int8-g32"), sample("heavy-tailed", (64, 4096), 0)
    payload = codec.encode(values, codec.tables(4096))
    blocks = gguf.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0).reshape(64, 128, 34)
    blocks = torch.from_numpy(blocks)
    assert torch.equal(payload[:, 4096:].view(64, 128, 2), blocks[:, :, :2])
    codes = payload[:, :4096].int() - 128
    difference = (codes.view(64, 128, 32) - blocks[:, :, 2:].view(torch.int8)).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.005  # measured 0.0031


def test_fp8_is_torchs_own_cast():
    """Every finite E4M3 value, all midpoints between two of them, and random values."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    values = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, sample("heavy-tailed", (1000,), 0)])
    groups = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    groups = torch.nn.functional.pad(groups.clamp(-448, 448), (1, 0), value=448.0)  # scale 1
    codec = get_codec("fp8-g256")
    payload = codec.encode(groups, codec.tables(256))
    cast = groups.to(torch.float8_e4m3fn)
    # Not their bytes alone: a negative zero is a zero.
    assert torch.equal(payload[:, :256].view(torch.float8_e4m3fn).float(), cast.float())
    assert torch.equal(payload[:, 256:].contiguous().view(torch.float32), torch.ones(len(cast), 1))
    assert torch.equal(through(codec, groups), cast.float())


@pytest.mark.parametrize(
    # One scale for the whole token makes its groups depend on each other.
    ("name", "group"),
    [(name, group) for name, group in GROUPS.items() if group and name != "nvfp4"],
)
def test_groups_do_not_see_each_other_and_the_last_may_be_short(name, group):
    codec = get_codec(name)
    values = sample("heavy-tailed", (5, 2 * group + 7), 0)
    alone = [through(codec, part) for part in values.split(group, dim=1)]
    assert [part.shape[1] for part in alone] == [group, group, 7]
    assert torch.equal(through(codec, values), torch.cat(alone, dim=1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_spoils_its_whole_group_and_no_other(name, bad):
    codec, values, group = get_codec(name), sample("normal", (3, 600), 0), GROUPS[name]
    values[1, 300] = 100.0  # for nvfp4: what rules the token is not in the spoiled group
    expected = through(codec, values)
    values[1, 3] = bad
    expected[1, :group] = torch.nan
    torch.testing.assert_close(through(codec, values), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "name", [*("int4-g32", "spike-g32", "nvfp4"), *("int8-token", "fp8-g256", "sdp4bit-plain")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_largest_values_stay_finite(name, dtype):
    """The format's largest value carries the type's, within a rounding of the scale."""
    largest = torch.finfo(dtype).max
    values = torch.tensor([[-largest, largest / 2, 0.0]], dtype=dtype)
    got = through(get_codec(name), values)
    assert got.isfinite().all()
    # fp32: taken for the largest BF16 value, 0.4 % less.
    torch.testing.assert_close(got[0, 0], values[0, 0].float(), rtol=2**-7, atol=0)
    assert got[0, 1] > 0
    assert got[0, 2] == 0


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        *(("int4-g16", 448.0), ("int4-g32-asym", 127.5 * 2**120), ("mxfp4", 6 * 2.0**125)),
        ("int8-g32", 128 * 65504.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_formats_that_end_earlier_saturate(name, largest, dtype):
    values = torch.tensor([[-torch.finfo(dtype).max, 0.0]], dtype=dtype)
    assert through(get_codec(name), values).tolist() == [[-largest, 0.0]]


@pytest.mark.parametrize("name", NAMES)
def test_smallest_values_are_zero_or_close(name):
    """Scales below the smallest normal number, where 1 / scale would be an infinity."""
    for exponent in (-120, -130, -140, -149):
        values = torch.tensor([[-(2.0**exponent), 0.0]])
        got = through(get_codec(name), values)
        assert got.isfinite().all()
        bound = 1.5 * values.abs()
        if name.endswith("-asym"):  # a zero is 15 steps from the least value, of a rounded scale
            bound += values.abs().max() / 2**8
        assert (got.abs() <= bound).all(), (exponent, got)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_are_sent_alike_whatever_their_signs(name):
    """Else the bytes would be up to the order in which a device compares."""
    codec, zeros = get_codec(name), torch.zeros(3, 600)
    zeros[1:, ::3] = -0.0
    zeros[2] *= -1
    first, *others = codec.encode(zeros, codec.tables(600)).tolist()
    assert others == [first, first]


def test_all_levels_of_int4_are_used():
    """The signed scale is worth 1 dB over absmax / 7 (measured 21.3 and 20.3 on a Gaussian)."""
    codec, values = get_codec("int4-g32"), sample("normal", (512, 576), 0)
    absmax = values.view(512, 18, 32).abs().amax(dim=-1, keepdim=True)
    scale = (absmax / 7).bfloat16().float()
    seven = ((values.view(512, 18, 32) / scale).round().clamp(-7, 7) * scale).view(512, 576)
    assert sqnr(values, through(codec, values)) > sqnr(values, seven) + 0.9


def test_no_name_reads_as_another_codec_with_bits():
    """tools/evaluate.py takes NAME-BITS for a codec of so many bits."""
    assert not [name for name in CODECS if re.fullmatch(r".+-\d+", name)]


def test_every_grouped_codec_is_listed_as_a_peer():
    assert list(PEERS) == [name for name, codec in CODECS.items() if issubclass(codec, Grouped)]
    assert {peer.collective for peer in PEERS.values()} == {"one-shot", "two-shot", None}
