"""Error feedback in the Triton kernels against the plain torch that specifies it, bit for bit.

`test_triton_kernels` runs this as `triton_cases`: in the interpreter, or on a GPU.
"""

import pytest
import torch
from cases import DTYPES, sample
from torch import Tensor
from triton_cases import (  # noqa: F401 (a fixture)
    BITS,
    DEVICE,
    ROTATED,
    _same,
    _same_payload,
    tables_of,
    triton_everywhere,
)

from megatron_lowbit import kernels
from megatron_lowbit.codecs import Codec, Tables, get_codec
from megatron_lowbit.codecs.carry import LARGEST, Carry
from megatron_lowbit.codecs.folding import fold
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels.switches import switched_off


@pytest.fixture(autouse=True)
def only_kernels(monkeypatch):
    """Plain torch in the place of a kernel is no pass."""
    for name in ("encode_with_carry", "reduce_encode_with_carry"):
        monkeypatch.setattr(Codec, name, _guarded(getattr(Codec, name)))


def _guarded(plain):
    def guarded(codec, values, tables, carry, **more) -> Tensor:
        assert switched_off() or carry.given is None, f"{plain.__name__} in plain torch"
        return plain(codec, values, tables, carry, **more)

    return guarded


def _carry(taken: Tensor | None, tokens: int, hidden: int, device: str) -> Carry:
    given = torch.full((tokens, hidden), 7.0, dtype=torch.bfloat16, device=device)
    taken = None if taken is None else taken.to(device)
    return Carry(taken, given, torch.zeros(1, dtype=torch.int64, device=device))


def _check(
    codec: Codec, partial: Tensor, taken: Tensor | None, tables: Tables, *, rank: int = 1
) -> int:
    """Payloads of a partial and of a sum, and their carries; gives how many rows were bounded."""
    size, on_cpu = (len(partial), tables.hidden), tables.to("cpu")
    right, got = _carry(taken, *size, "cpu"), _carry(taken, *size, DEVICE)
    right_sum, got_sum = _carry(taken, *size, "cpu"), _carry(taken, *size, DEVICE)
    with kernels.disabled():
        expected = codec.encode_with_carry(partial.cpu(), on_cpu, right, rank=rank)
        rows = torch.stack([codec.encode(partial.cpu().flip(0), on_cpu, rank=0), expected])
        of_sum = codec.reduce_encode_with_carry(rows, on_cpu, right_sum)
    payload = codec.encode_with_carry(partial.to(DEVICE), tables, got, rank=rank)
    summed = codec.reduce_encode_with_carry(rows.to(DEVICE), tables, got_sum)
    _same_payload(payload.cpu(), expected, codec, tables)
    _same(got.given.cpu(), right.given, f"{codec}: what a partial gives")
    _same_payload(summed.cpu(), of_sum, codec.for_sum(), tables)
    _same(got_sum.given.cpu(), right_sum.given, f"{codec}: what a sum gives")
    counts = [carry.bounded.item() for carry in (got, right, got_sum, right_sum)]
    assert counts[0] == counts[1] and counts[2] == counts[3]
    return counts[0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ROTATED)
def test_bits(name, bits):
    """Every number of bits, another one in the sum, carries of BF16 and of fp32, and none."""
    codec = get_codec(name, bits=(bits, 7 - bits))
    taken = sample("normal", (2, 96), 9)
    taken = [taken.bfloat16(), taken, None][bits % 3]
    _check(codec, sample("heavy-tailed", (2, 96), bits).bfloat16(), taken, tables_of(codec, 96, 5))


@pytest.mark.parametrize(
    ("hidden", "kept", "tokens"), [(1, 0, 2), (1, 1, 1), (33, 7, 2), (64, 1, 0), (200, 0, 1)]
)
def test_shapes(hidden, kept, tokens):
    """One feature, an odd size (no rotation), one block, several and a padded row; no token."""
    codec = get_codec("shaped-hybrid", bits=3)
    partial, taken = sample("normal", (2, tokens, hidden), 0)
    _check(codec, partial.half(), taken.bfloat16(), tables_of(codec, hidden, kept))


def test_a_long_row():
    codec = get_codec("shaped-hybrid")
    partial, taken = sample("heavy-tailed", (2, 1, 4096), 0).bfloat16()
    _check(codec, partial, taken, tables_of(codec, 4096, 32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_and_strides(dtype):
    """Of the partial and of both carries."""
    codec = get_codec("shaped-hybrid")
    tables, wide = tables_of(codec, 48, 3), sample("heavy-tailed", (48, 100), 3)
    _check(codec, wide[:4:2, 3:51].to(dtype), wide[:, :2].to(dtype).T, tables)
    _check(codec, wide[:, :2].to(dtype).T, wide[:1, 4:52].bfloat16().expand(2, 48), tables)
    right, got = (_carry(wide[:2, :48], 2, 48, device) for device in ("cpu", DEVICE))
    with kernels.disabled():
        codec.encode_with_carry(wide[2:4, :48], tables.to("cpu"), right)
    spread = torch.zeros(48, 4, dtype=torch.bfloat16, device=DEVICE)
    given = got._replace(given=spread[:, ::2].T)
    codec.encode_with_carry(wide[2:4, :48].to(DEVICE), tables, given)
    _same(given.given.cpu(), right.given, "a strided carry")
    assert not spread[:, 1::2].any()


def test_a_carry_where_the_last_one_lay():
    codec = get_codec("rotated-hybrid")
    tables, partial = tables_of(codec, 96, 5), sample("normal", (3, 96), 0).to(DEVICE)
    taken = sample("normal", (3, 96), 1).bfloat16().to(DEVICE)
    apart = torch.empty_like(taken)
    payload = codec.encode_with_carry(partial, tables, Carry(taken.clone(), apart))
    again = codec.encode_with_carry(partial, tables, Carry(taken, taken))
    assert torch.equal(payload, again) and torch.equal(taken, apart)


def test_the_last_gives_nothing():
    """And no carry at all is plain encoding."""
    codec = get_codec("shaped-hybrid")
    tables, partial = tables_of(codec, 32, 2), sample("normal", (2, 32), 0)
    taken = sample("normal", (2, 32), 1).bfloat16()
    for carry in (Carry(taken.to(DEVICE)), Carry()):
        payload = codec.encode_with_carry(partial.to(DEVICE), tables, carry)
        sent = partial if carry.taken is None else partial + taken.float()
        assert torch.equal(payload, codec.encode(sent.to(DEVICE), tables))


def test_rows_that_are_not_finite():
    """In the body, in a BF16 feature and in what is taken; huge and tiny rows; the others stay."""
    codec = get_codec("shaped-hybrid", bits=2)
    tables = tables_of(codec, 12, 4)
    partial, taken = sample("normal", (2, 9, 12), 0)
    index = tables.bf16_index.cpu()
    body = next(i for i in range(12) if i not in index)
    for row, bad in enumerate((torch.nan, torch.inf)):
        partial[row, body], partial[2 + row, index[1]], taken[4 + row, body] = bad, bad, bad
    partial[6], taken[6], partial[7], taken[7] = 3e38, 3e38, 1e-45, 0.0
    _check(codec, partial, taken, tables)


def test_the_bound():
    """A lone spike at 2 bits with nothing to rotate it over, beside rows that need no bound."""
    codec = get_codec("rotated-hybrid", bits=2)
    partial = sample("normal", (4, 95), 1)
    partial[::2] = 0
    partial[::2, 40] = 1000.0
    tables = tables_of(codec, 95, 0)
    assert _check(codec, partial, None, tables) == 2
    carry = _carry(None, 4, 95, DEVICE)
    codec.encode_with_carry(partial.to(DEVICE), tables, carry)
    size = carry.given.float().norm(dim=1) / partial.to(DEVICE).norm(dim=1)
    assert size[::2].sub(LARGEST).abs().max() < 0.01 and size[1::2].max() < 0.5


def test_offsets_above_two_to_the_31():
    codec = get_codec("rotated-hybrid")
    tables = tables_of(codec, 64, 1)
    try:
        far = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=DEVICE)  # not touched
    except RuntimeError:
        pytest.skip("no 4 GiB to reserve here")
    partial, taken = sample("normal", (2, 2, 64), 0).to(DEVICE)
    near = torch.zeros(2, 64, dtype=torch.bfloat16, device=DEVICE)
    payload = codec.encode_with_carry(partial, tables, Carry(taken, near))
    for carry in (far.as_strided((2, 64), (2**31, 1)), far[:2].as_strided((2, 64), (1, 2**25))):
        carry.copy_(taken)
        again = codec.encode_with_carry(partial, tables, Carry(carry, carry))
        if carry.stride(0) > 1:
            codec.encode_with_carry(partial, tables, Carry(taken.bfloat16(), near))
        assert torch.equal(again, codec.encode(partial + taken.bfloat16().float(), tables))
        assert torch.equal(carry, near)
    assert payload.shape == again.shape


def test_what_is_not_supported_is_named():
    codec = get_codec("rotated-hybrid")
    tables, partial = tables_of(codec, 64, 2), torch.zeros(2, 64, device=DEVICE)
    given = torch.zeros(2, 64, dtype=torch.bfloat16, device=DEVICE)
    for carry, says in (
        (Carry(given[:1], given), r"a carry is \[2, 64\], taken is \[1, 64\]"),
        (Carry(given, given[:, 1:]), r"a carry is \[2, 64\], given is \[2, 63\]"),
        (Carry(given, partial), "a carry is kept in BF16, given is torch.float32"),
        (Carry(partial.double(), given), "float64: the GPU kernels take bfloat16, float16"),
    ):
        with pytest.raises(LowbitError, match=says):
            codec.encode_with_carry(partial, tables, carry)
        with pytest.raises(LowbitError, match=says):
            payloads = codec.encode(partial, tables)[None]
            codec.reduce_encode_with_carry(payloads, tables, carry)
    _, folded = fold(torch.ones(64, 2, device=DEVICE), tables)
    with pytest.raises(LowbitError, match="folded weight's error is rotated"):
        wide = torch.zeros(2, 66, device=DEVICE)
        codec.encode_with_carry(wide, folded, Carry(None, given))
