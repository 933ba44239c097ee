"""The Triton kernels against the plain torch that specifies them, bit for bit.

`test_triton_kernels` runs this in a process of its own: in Triton's interpreter, on CPU tensors, or
on a GPU. Where a value is NaN only that it is NaN is compared.
"""

import os
from dataclasses import replace

import pytest
import torch
from cases import DTYPES, sample
from torch import Tensor

from megatron_lowbit import kernels
from megatron_lowbit.benchmark.gpu_check.work import hard_cases, kernel_cases
from megatron_lowbit.benchmark.gpu_check.work.interpreted import interpret
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import (
    ALL,
    GROUPED,
    ROTATED,
    WAYS,
)
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import check as _check
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import check_sums as _check_sums
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import same as _same
from megatron_lowbit.codecs import CODECS, Codec, Statistics, Tables, codebook, get_codec
from megatron_lowbit.codecs.base import LowbitError
from megatron_lowbit.codecs.carry import Carry
from megatron_lowbit.codecs.peers.sdp4bit import turn_back
from megatron_lowbit.kernels import select

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(scope="module", autouse=True)
def triton_everywhere():
    """CPU tensors go the way of GPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(select, "_kind", select._kind)  # to be put back
            patch.setattr(select, "_trouble", select._trouble)
            interpret()
        yield


def tables_of(codec: Codec, hidden: int, kept: int, ranks: int = 3) -> Tables:
    return kernel_cases.tables_of(codec, hidden, kept, ranks=ranks, device=DEVICE)


@pytest.mark.parametrize(("name", "bits"), kernel_cases.all_bits())
def test_bits(name, bits):
    """Every number of bits in partials, and in the rotated another one in the sum."""
    kernel_cases.check_bits(name, bits, DEVICE)


# By format, values of a group by which the step is a power of two: the step, and the values.
STEPS = {
    **{"signed": (1, (-8, 7)), "signed-e4m3": (1, (-8, 7))},
    **{"fp8": (1, (-448, 448)), "mxfp4": (1, (-7.5, 7.5)), "nvfp4": (448, (-2688, 2688))},
    **{"affine": (1, (0, 15)), "spikes": (1, (-1, 4, 0, 3))},
}


@pytest.mark.parametrize("name", GROUPED)
def test_ties(name):
    """Values halfway between two of a format, and the largest of groups between two scales."""
    codec = get_codec(name)
    top = 2 ** (codec.bits - 1) - 1
    step, fixed = STEPS.get(codec.format, (1, (-top, top)))  # of the absmax by default
    values = step * torch.cat([torch.arange(-64.0, 65) / 8, torch.arange(-32.0, 33) / 1024])
    size = codec.group or 32
    free = size - len(fixed)
    rows = values.repeat(2)[: -(-len(values) // free) * free].view(-1, free)
    rows = torch.cat([torch.tensor(fixed).expand(len(rows), -1), rows], dim=1)
    if codec.format == "absmax-rotated":
        rows = turn_back(rows)  # exact: the rotation makes the same values of it
    _check(codec, [rows], tables_of(codec, size, 0))
    sizes = torch.outer(2.0 ** torch.arange(-13, 10), 1 + torch.arange(256) / 256)[:, ::5].flatten()
    groups = torch.zeros(len(sizes[:1024]), size)
    groups[:, 1] = sizes[:1024]
    groups[::2] *= -1
    rows = groups.view(-1, 16384) if codec.group else groups[::32]
    _check(codec, [rows], tables_of(codec, rows.shape[1], 0))


def test_scaled_without_means():
    """Statistics that know the variance only: nothing is centred."""
    codec = get_codec("scaled-hybrid")
    partials = [sample("heavy-tailed", (2, 40), seed) + 1 for seed in range(2)]
    statistics = replace(Statistics.of(torch.stack(partials)), mean=None)
    tables = codec.tables(40, bf16_index=torch.tensor([3]), statistics=statistics).to(DEVICE)
    assert tables.center is None
    _check(codec, partials, tables)


def test_scaled_divides():
    """Values on a threshold, which the product with a rounded reciprocal puts on its other side."""
    codec = get_codec("scaled-hybrid")
    generator = torch.Generator().manual_seed(0)
    scale, values = torch.full((64,), 1.0), torch.empty(64)
    thresholds = codebook.thresholds(4, torch.device("cpu"))
    for place, threshold in enumerate(thresholds[thresholds != 0].repeat(2)):
        tried = torch.rand(1000, generator=generator) + 0.5
        near = threshold * tried
        tells = (near / tried > threshold) != (near * (1 / tried) > threshold)
        [[chosen], *_] = tells.nonzero()
        scale[place], values[place] = tried[chosen], near[chosen]
    rest = 64 - (values[: place + 1] / scale[: place + 1]).square().sum()
    values[place + 1 :] = (
        rest / (63 - place)
    ).sqrt()  # a root mean square of 1: nothing else moves
    tables = tables_of(codec, 64, 0)
    tables = replace(tables, scale=scale.to(DEVICE)[None], center=None, center_sum=None)
    _check(codec, [values[None]], tables)


@pytest.mark.parametrize("name", ROTATED)
def test_a_folded_weight(name):
    kernel_cases.check_folded(name, DEVICE)


@pytest.mark.parametrize("hidden", [1, 33, 64, 576])
@pytest.mark.parametrize("name", ALL)
def test_shapes(name, hidden):
    """One feature, an odd size (no rotation), one block, several and a padded row."""
    codec = get_codec(name, bits=3 if 3 in CODECS[name].supported_bits else None)
    for tokens, kept in ((0, 1), (1, 0), (2, 7)):
        partials = [sample("normal", (tokens, hidden), seed) for seed in range(2)]
        _check(codec, partials, tables_of(codec, hidden, kept))


@pytest.mark.parametrize("name", ALL)
def test_a_long_row(name):
    kernel_cases.check_long(name, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WAYS)
def test_types_and_strides(name, dtype):
    hard_cases.check_strides(name, dtype, DEVICE)


@pytest.mark.parametrize("name", ALL)
def test_rows_that_are_not_finite(name):
    hard_cases.check_not_finite(name, DEVICE)


@pytest.mark.parametrize("name", ALL)
def test_extreme_values(name):
    """Zeros of both signs, constants, subnormal and huge numbers, every exponent of each type."""
    codec = get_codec(name)
    tables = tables_of(codec, 32, 6)
    rows = [torch.full((32,), value) for value in (0.0, -0.0, 0.7, 3.4e38, 1e-45, 6e-39)]
    rows.append(2.0 ** torch.arange(-149.0, 128.0, 9)[:32].clone().resize_(32).nan_to_num(1.0))
    rows.append(torch.tensor([1.0, torch.inf, torch.nan, -torch.inf] * 8))
    _check(codec, [torch.stack(rows)], tables)
    every = torch.arange(-(2**15), 2**15, 61, dtype=torch.int16)[:1056].view(33, 32)
    for dtype in (torch.float16, torch.bfloat16):
        _check(codec, [every[::4].view(dtype)], tables)


def test_codes_of_random_bytes():
    """Payloads that no encode makes: any scale, any BF16, as a damaged message has them."""
    for name in ALL:
        if name == "spike-g32":  # in which bytes are places
            continue
        codec = get_codec(name, bits=5 if 5 in CODECS[name].supported_bits else None)
        tables = tables_of(codec, 40, 3)
        shape = (3, 3, codec.row_bytes(tables))
        generator = torch.Generator().manual_seed(0)
        payloads = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        dtypes = DTYPES if name in WAYS else (None,)
        _check_sums(codec, payloads.to(DEVICE), tables, dtypes=dtypes)


@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks(ranks):
    for name in ALL[1:]:
        codec = get_codec(name)
        partials = [sample("normal", (1, 64), seed) * 3.0**seed for seed in range(ranks)]
        _check(codec, partials, tables_of(codec, 64, 2, ranks))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [33, 96])
def test_norm(hidden, dtype):
    """Bias and residual or not, BF16 features or not, a token that is not finite."""
    codec = get_codec("shaped-hybrid")
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(2, hidden, generator=generator) + 1).to(dtype)
    residual = torch.randn(hidden, 3, generator=generator).to(dtype).T
    for kept, more in ((5, {"bias": bias, "residual": residual}), (0, {"residual": residual})):
        tables = tables_of(codec, hidden, kept)
        partials = [sample("normal", (3, hidden), seed) for seed in range(2)]
        partials[0][1, 7] = torch.nan
        payloads = torch.stack([codec.encode(x.to(DEVICE), tables) for x in partials])
        more |= {"weight": weight, "epsilon": 1e-5}
        with kernels.disabled():
            expected = codec.decode_sum_norm(payloads.cpu(), tables.to("cpu"), **more)
        more = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in more.items()}
        for got, right in zip(
            codec.decode_sum_norm(payloads, tables, **more), expected, strict=True
        ):
            _same(got.cpu(), right, f"hidden {hidden}, {dtype}, {kept} features in BF16")
        assert right.isnan().any(dim=1).tolist() == [False, True, False]


def test_norm_is_rms_norm():
    """Close to torch's own, by the same sum."""
    codec = get_codec("rotated-hybrid")
    tables = tables_of(codec, 64, 2)
    payloads = codec.encode(sample("normal", (3, 64), 0).to(DEVICE), tables)[None]
    weight = sample("normal", (64,), 1).to(DEVICE)
    normed, total = codec.decode_sum_norm(payloads, tables, weight=weight, epsilon=1e-5)
    assert torch.equal(total, codec.decode_sum(payloads, tables))
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(total, (64,), weight, 1e-5))
    with pytest.raises(LowbitError, match=r"a residual is \[3, 64\], got \[64, 3\]"):
        codec.decode_sum_norm(
            payloads, tables, weight=weight, epsilon=1e-5, residual=torch.zeros(64, 3)
        )


@pytest.mark.parametrize("name", [ROTATED[0], GROUPED[0]])
def test_offsets_above_two_to_the_31(name):
    far = hard_cases.far_memory(DEVICE)
    if far is None:
        pytest.skip("no 4 GiB to reserve here")
    hard_cases.check_far(name, far)


def test_what_is_not_supported_is_named():
    for name in ALL:
        codec = get_codec(name)
        tables = tables_of(codec, 64, 0)
        row = codec.row_bytes(tables)
        with pytest.raises(LowbitError, match=r"\[tokens, 64\], got \[2, 65\]"):
            codec.encode(torch.zeros(2, 65, device=DEVICE), tables)
        with pytest.raises(LowbitError, match="float64: the GPU kernels take bfloat16, float16"):
            codec.encode(torch.zeros(2, 64, dtype=torch.float64, device=DEVICE), tables)
        payloads = torch.zeros(1, 2, row, dtype=torch.uint8, device=DEVICE)
        for bad in (payloads.float(), payloads[..., 1:], payloads[:0]):
            with pytest.raises(LowbitError, match=rf"uint8 \[ranks, tokens, {row}\]"):
                codec.decode_sum(bad, tables)
        with pytest.raises(LowbitError, match=r"\[2, 64\].*got \[3, 64\]"):
            codec.decode_sum(payloads, tables, out=torch.zeros(3, 64, device=DEVICE))
    codec = get_codec("rotated-hybrid")
    long = tables_of(codec, (1 << 15) + 1, 0)
    with pytest.raises(LowbitError, match="hidden size 32769: the GPU kernels take 1 to 32768"):
        codec.encode(torch.zeros(1, (1 << 15) + 1, device=DEVICE), long)


def _calls(family: str) -> dict:
    """Arguments and result of a call of every function of a family, by its op's name."""
    prefix = "rotated" if family == "norm" else family
    codec = get_codec("spike-g32" if family == "grouped" else f"{prefix}-hybrid")
    tables = tables_of(codec, 32, 2)
    partial = sample("normal", (2, 32), 0).to(DEVICE)
    payloads = codec.encode(partial, tables)[None]
    recorder = _Recorder(select.kernels_for(family, partial))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "kernels_for", lambda *_: recorder)
        if family == "norm":
            weight = torch.ones(32, device=DEVICE)
            codec.decode_sum_norm(payloads, tables, weight=weight, epsilon=1e-5)
        else:
            codec.encode(partial, tables)
            codec.decode_sum(payloads, tables)
        if family == "rotated":
            codec.reduce_encode(payloads, tables)
            taken, given = torch.zeros(2, 2, 32, dtype=torch.bfloat16, device=DEVICE)
            carry = Carry(taken, given, torch.zeros(1, dtype=torch.int64, device=DEVICE))
            codec.encode_with_carry(partial, tables, carry)
            codec.reduce_encode_with_carry(payloads, tables, carry)
    return {f"{prefix}_{name}": call for name, call in recorder.calls.items()}


class _Recorder:
    """Kernels that remember their calls."""

    def __init__(self, kernels):
        self._kernels, self.calls = kernels, {}

    def __getattr__(self, name):
        function = getattr(self._kernels, name)

        def call(*arguments, **others):
            result = function(*arguments, **others)
            self.calls[name] = (arguments, others, result)
            return result

        return call


@pytest.mark.parametrize("family", ["rotated", "static", "scaled", "grouped", "norm"])
def test_ops_are_what_torch_expects(family):
    """Schemas, fake implementations, aliasing; and torch.compile takes them without a break."""
    torch.compiler.reset()  # what it compiled before counts against its limit
    for name, (arguments, others, result) in _calls(family).items():
        if others.pop("out", 0) is None:  # the op writes into its first argument
            arguments = (torch.empty_like(result), *arguments)
        op = getattr(torch.ops.megatron_lowbit, name).default
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(op, arguments, others, test_utils=checks)

        def call(*arguments, op=op, others=others):
            given = op(*arguments, **others)
            return arguments[0] if given is None else given

        got = torch.compile(call, fullgraph=True, backend="aot_eager")(*arguments)
        pairs = zip(got, result, strict=True) if isinstance(got, tuple) else [(got, result)]
        assert all(torch.equal(a, b) for a, b in pairs), name


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", WAYS)
def test_a_graph_replays_with_other_inputs(name):
    hard_cases.check_graph(name, DEVICE)
