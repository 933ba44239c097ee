"""Packing: every count of every width comes back, in the promised number of bytes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lowbit.codecs import wire


@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 3), st.integers(0, 2**31))
def test_codes_come_back(bits, count, tokens, seed):
    codes = torch.randint(
        0, 2**bits, (tokens, count), generator=torch.Generator().manual_seed(seed)
    )
    packed = wire.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (tokens, wire.packed_bytes(count, bits))
    assert torch.equal(wire.unpack(packed, bits, count), codes.int())


def test_layout_is_little_endian():
    assert wire.pack(torch.tensor([[1, 2, 15]]), 4).tolist() == [[0x21, 0x0F]]
    eight = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 7]])
    assert wire.pack(eight, 3).tolist() == [[0x01, 0x00, 0xE0]]


def test_no_wasted_bytes():
    assert [wire.packed_bytes(576, bits) for bits in (2, 3, 4)] == [144, 216, 288]
    assert wire.packed_bytes(577, 3) == 219


@given(st.integers(0, 9), st.integers(0, 5), st.integers(0, 3))
def test_rows_split_as_they_were_joined(body_bytes, floats, tokens):
    body = torch.randint(0, 256, (tokens, body_bytes), dtype=torch.uint8)
    values = torch.randn(tokens, floats).bfloat16()
    rows = wire.join_row(body, values)
    assert rows.shape == (tokens, wire.row_bytes(body_bytes, floats))
    got_body, got_values = wire.split_row(rows, body_bytes)
    assert torch.equal(got_body, body)
    assert torch.equal(got_values, values.float())


def test_bf16_saturates_and_keeps_non_finite_visible():
    largest = torch.finfo(torch.bfloat16).max
    values = torch.tensor([3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan, 1.0])
    wired = wire.to_wire_bf16(values)
    assert wired[:2].tolist() == [largest, -largest]
    assert wired[2:5].isnan().all()
    assert wired[5] == 1
