"""The codecs that were tried, against what they must keep to be measured fairly.

Shapes, zeros, tokens apart and values that are not finite are in test_codecs.py.
"""

import pytest
import torch
from cases import payloads_of, reference_sum, sample, tables_for

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.codecs import CANDIDATES, CODECS, get_codec, parse_codec
from megatron_lowbit.codecs.rotated_hybrid import RotatedHybrid
from megatron_lowbit.errors import LowbitError

# SQNR floors in dB at 4, 3 and 2 bits of the sum of 4 ranks, normal input, 512 x 576 tokens, 4
# features in BF16: what was measured less 0.1 dB.
FLOORS = {
    "try-centred": (20.2, 14.6, 9.2),
    "try-evened": (20.2, 14.6, 9.2),
    "try-unrotated": (20.2, 14.5, 9.2),
    "try-uniform": (19.3, 14.2, 9.2),
    "try-companded": (20.0, 14.5, 9.2),
    "try-dither": (19.3, 14.1, 8.7),
    "try-vector": (21.0, 15.2, 9.6),
    "try-lattice": (20.0, 14.9, 9.8),
    "try-trellis": (21.9, 16.3, 10.6),
}
CASES = [(name, bits) for name in CANDIDATES for bits in (4, 3, 2)]
pytestmark = pytest.mark.slow  # nobody serves with them
each_case = pytest.mark.parametrize(("name", "bits"), CASES)
each_name = pytest.mark.parametrize("name", CANDIDATES)


@each_case
def test_sqnr_floor(name, bits):
    codec = parse_codec(f"{name}-{bits}")
    partials = [sample("normal", (512, 576), seed) for seed in range(4)]
    total = reference_sum(codec, partials, tables_for(codec, partials, 4))
    got = sqnr(torch.stack(partials).double().sum(dim=0), total)
    floor = FLOORS[name][(4, 3, 2).index(bits)]
    assert got >= floor, f"{codec}: {got:.2f} dB, floor {floor}"


@each_case
def test_rows_are_as_long_as_those_of_shaped_hybrid(name, bits):
    partials = [sample("normal", (2, 576), 0)]
    sizes = []
    for codec in (parse_codec(f"{name}-{bits}"), get_codec("shaped-hybrid", bits=bits)):
        tables = tables_for(codec, partials, 4)
        sizes.append(codec.encode(partials[0], tables).shape[1])
    assert sizes[0] == sizes[1]


@each_name
def test_a_sum_quantized_again_is_close(name):
    codec = parse_codec(f"{name}-4+3")
    partials = [sample("normal", (64, 576), seed) for seed in range(3)]
    tables = tables_for(codec, partials, 4)
    payloads = payloads_of(codec, partials, tables)
    total = codec.for_sum().decode_sum(codec.reduce_encode(payloads, tables)[None], tables)
    # The noise of both steps, by the floors of each.
    noise = sum(10 ** (-decibel / 10) for decibel in FLOORS[name][:2])
    floor = -10 * torch.tensor(noise).log10().item() - 0.1
    got = sqnr(torch.stack(partials).double().sum(dim=0), total)
    assert got >= floor, f"{codec}: {got:.2f} dB, floor {floor:.2f}"


@each_name
def test_nobody_serves_with_a_candidate(name):
    assert name.startswith("try-")
    assert name not in CODECS
    assert parse_codec(name).name == name
    with pytest.raises(LowbitError, match=f"unknown codec '{name}'"):
        get_codec(name)


@pytest.mark.parametrize("codec", (CODECS | CANDIDATES).values(), ids=lambda codec: codec.name)
def test_other_codes_never_reach_the_kernels(codec):
    """They know the codes of `rotated-hybrid` only."""
    if not issubclass(codec, RotatedHybrid):
        return
    other = codec._pack is not RotatedHybrid._pack or codec._unpack is not RotatedHybrid._unpack
    assert other == (codec.kernels is not RotatedHybrid.kernels)
