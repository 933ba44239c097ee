"""Flash Communication's formats: offsets, spikes. Their bytes are in test_grouped.py."""

import pytest
import torch
from cases import sample, through

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.codecs import get_codec


def test_asymmetric_takes_the_wire_numbers_to_encode():
    """The zero, -257, is -256 in BF16, and 15 steps of 1 from there end at -241."""
    values = torch.tensor([[-257.0, -242.0, -250.0]])
    assert through(get_codec("int4-g32-asym"), values).tolist() == [[-256.0, -242.0, -250.0]]


def test_an_offset_costs_little():
    """What the zero is for; measured 22.1 dB without, 22.1 with, and 8.9 by a scale alone."""
    values = sample("normal", (256, 64), 0)
    asymmetric, symmetric = get_codec("int4-g32-asym"), get_codec("int4-g32")
    without = sqnr(values, through(asymmetric, values))
    shifted = sqnr(values, through(asymmetric, values + 8) - 8)
    scale_alone = sqnr(values, through(symmetric, values + 8) - 8)
    assert shifted > without - 1, (shifted, without)
    assert shifted > scale_alone + 10, (shifted, scale_alone)


@pytest.mark.parametrize("hidden", [1, 2, 3, 32, 33, 70])
def test_spikes_are_exact_to_bf16_in_every_group(hidden):
    values = sample("heavy-tailed", (50, hidden), 0)
    got = through(get_codec("spike-g32"), values)
    for mine, exact in zip(got.split(32, dim=1), values.split(32, dim=1), strict=True):
        for extreme, place in (exact.max(dim=1), exact.min(dim=1)):
            sent = mine.gather(1, place[:, None])[:, 0]
            assert torch.equal(sent, extreme.bfloat16().float())


@pytest.mark.parametrize("places", [(0, 1), (1, 0), (0, 2), (1, 2), (31, 0), (5, 5)])
def test_spikes_are_out_of_the_others_range_wherever_they_are(places):
    values = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat(8)[None]
    values[0, places[0]], values[0, places[1]] = 1e4, -1e4
    assert torch.equal(through(get_codec("spike-g32"), values).bfloat16(), values.bfloat16())


def test_spike_reserving_is_what_makes_two_bits_work():
    """At 4.5 bits in all, against int2 with scale and zero alone in 3."""
    values = sample("heavy-tailed", (512, 576), 0)
    apart, within = (
        sqnr(values, through(get_codec(name, bits=2), values))
        for name in ("spike-g32", "int4-g32-asym")
    )
    assert apart > within + 6, (apart, within)  # measured 11.9 and 4.9
