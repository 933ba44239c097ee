"""Error feedback in the Triton kernels against the plain torch that specifies it, bit for bit.

`test_triton_kernels` runs this as `triton_cases`: in the interpreter, or on a GPU.
"""

import pytest
import torch
from cases import DTYPES, sample
from torch import Tensor
from triton_cases import DEVICE, tables_of, triton_everywhere  # noqa: F401 (a fixture)

from megatron_lowbit.benchmark.gpu_check.work import hard_cases, kernel_cases
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import BITS, ROTATED
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import check_carry as _check
from megatron_lowbit.codecs import Codec, get_codec
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


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ROTATED)
def test_bits(name, bits):
    """Every number of bits, another one in the sum, carries of BF16 and of fp32, and none."""
    kernel_cases.check_carried_bits(name, bits, DEVICE)


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
    hard_cases.check_carry_strides(dtype, DEVICE)


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
    hard_cases.check_carry_not_finite(DEVICE)


def test_the_bound():
    """A lone spike at 2 bits with nothing to rotate it over, beside rows that need no bound."""
    codec = get_codec("rotated-hybrid", bits=2)
    partial = sample("normal", (4, 95), 1)
    partial[::2] = 0
    partial[::2, 40] = 1000.0
    tables = tables_of(codec, 95, 0)
    assert _check(codec, partial, None, tables) == 2
    carry = kernel_cases.new_carry(None, 4, 95, DEVICE)
    codec.encode_with_carry(partial.to(DEVICE), tables, carry)
    size = carry.given.float().norm(dim=1) / partial.to(DEVICE).norm(dim=1)
    assert size[::2].sub(LARGEST).abs().max() < 0.01 and size[1::2].max() < 0.5


def test_offsets_above_two_to_the_31():
    far = hard_cases.far_memory(DEVICE)
    if far is None:
        pytest.skip("no 4 GiB to reserve here")
    hard_cases.check_far_carry(far)


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
