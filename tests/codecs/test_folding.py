"""A rotation folded into the weight: what the weight makes, what payloads say, what is refused."""

import pytest
import torch
import torch.distributed as dist
from cases import payloads_of, through

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.codecs import Statistics, get_codec
from megatron_lowbit.codecs.folding import fold
from megatron_lowbit.comm import all_reduce
from megatron_lowbit.errors import LowbitError

TOKENS, INPUTS, RANKS = 16, 64, 2
INDEX = torch.tensor([3, 40])


def _case(name: str, bits: int, hidden: int, dtype: torch.dtype, kept=INDEX):
    """Per rank an input and a weight; the codec, and its tables for their partials."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(RANKS, TOKENS, INPUTS, generator=generator).to(dtype)
    weights = torch.randn(RANKS, hidden, INPUTS, generator=generator) / INPUTS**0.5
    weights[:, INDEX[0]] *= 50  # an outlier
    weights = weights.to(dtype)
    partials = inputs @ weights.transpose(1, 2)
    codec = get_codec(name, bits=bits)
    tables = codec.tables(hidden, bf16_index=kept, statistics=Statistics.of(partials))
    return inputs, weights, partials, codec, tables


@pytest.mark.parametrize("name", ["rotated-hybrid", "shaped-hybrid"])
@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("hidden", [48, 64, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folded_partials_sum_to_the_same(name, bits, hidden, dtype):
    inputs, weights, partials, codec, tables = _case(name, bits, hidden, dtype)
    exact = partials.float().sum(dim=0)
    plain = payloads_of(codec, partials, tables)
    payloads = []
    for rank in range(RANKS):
        weight, folded = fold(weights[rank], tables)
        assert weight.shape == (hidden + 2, INPUTS)
        assert weight.dtype == dtype
        partial = inputs[rank] @ weight.t()
        assert torch.equal(partial[:, hidden:], partials[rank][:, INDEX])
        payloads.append(codec.encode(partial, folded, rank=rank))
    payloads = torch.stack(payloads)
    assert payloads.shape == plain.shape, "not a byte more"
    total = codec.decode_sum(payloads, folded)
    before = sqnr(exact, codec.decode_sum(plain, tables))
    # Folding rounds the weight and the rotated values to their dtype: the loss is far below the
    # codec's own noise (here 14 dB at 3 bits, 31 at 6), which differs by up to half a dB by chance.
    assert sqnr(exact, total) > before - 0.7
    if dtype == torch.float32 and bits == 4:
        same = (payloads[..., : hidden // 2] == plain[..., : hidden // 2]).float().mean()
        assert same > 0.99, "in fp32 only values near a threshold get another code"
    sum_codec = codec.for_sum()
    of_sum = codec.reduce_encode(payloads, folded)
    two_shot = sum_codec.decode_sum(of_sum[None], folded)
    of_plain = sum_codec.decode_sum(codec.reduce_encode(plain, tables)[None], tables)
    assert sqnr(exact, two_shot) > sqnr(exact, of_plain) - 0.7


@pytest.mark.parametrize("name", ["rotated-hybrid", "shaped-hybrid"])
@pytest.mark.parametrize("kept", [INDEX, None])
def test_kernel_and_reference_agree(name, kept):
    inputs, weights, _, codec, tables = _case(name, 4, 576, torch.bfloat16, kept)
    weight, folded = fold(weights[1], tables)
    partial = inputs[1] @ weight.t()
    expected = codec._reference_encode(partial, folded, 1)
    assert torch.equal(codec.encode(partial, folded, rank=1), expected)


def test_not_finite_values_stay_visible():
    inputs, weights, _, codec, tables = _case("rotated-hybrid", 4, 64, torch.bfloat16)
    weight, folded = fold(weights[0], tables)
    inputs[0, 5, 0] = torch.nan
    total = through(codec, inputs[0] @ weight.t(), folded)
    assert total[5].isnan().all()
    assert total[:5].isfinite().all()
    assert total[6:].isfinite().all()


def test_what_cannot_be_folded_is_refused():
    _, weights, partials, _, tables = _case("rotated-hybrid", 4, 64, torch.bfloat16)
    static = get_codec("static-hybrid")
    of_static = static.tables(64, statistics=Statistics.of(partials))
    with pytest.raises(LowbitError, match="static-hybrid has no rotation to fold"):
        fold(weights[0], of_static)
    with pytest.raises(LowbitError, match="quantized weight"):
        fold(weights[0].to(torch.float8_e4m3fn), tables)
    with pytest.raises(LowbitError, match="a weight of 63 rows, tables for 64"):
        fold(weights[0][1:], tables)


@pytest.fixture
def single_rank_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_collective_that_sends_no_payloads_is_refused(single_rank_group):
    _, weights, partials, codec, tables = _case("rotated-hybrid", 4, 64, torch.bfloat16)
    _, folded = fold(weights[0], tables)
    wide = torch.zeros(TOKENS, 66)
    call = {"codec": codec, "tables": folded}
    with pytest.raises(LowbitError, match="rotated, which native does not undo"):
        all_reduce(wide, collective="native", **call)
    with pytest.raises(LowbitError, match="inference only"):
        all_reduce(wide.requires_grad_(), collective="one-shot", **call)
    with pytest.raises(LowbitError, match="tables are for hidden size 66, the tensor has 64"):
        all_reduce(partials[0], collective="one-shot", **call)
