"""The Triton kernels against the plain torch that specifies them, bit for bit.

`test_triton_kernels` runs this in a process of its own: in Triton's interpreter, on CPU tensors, or
on a GPU. Where a value is NaN only that it is NaN is compared.
"""

import itertools
import os
from dataclasses import replace

import pytest
import torch
from cases import DTYPES, sample
from torch import Tensor

from megatron_lowbit import kernels
from megatron_lowbit.codecs import CODECS, Codec, Statistics, Tables, codebook, get_codec, wire
from megatron_lowbit.codecs.base import LowbitError
from megatron_lowbit.codecs.carry import Carry
from megatron_lowbit.codecs.folding import fold
from megatron_lowbit.codecs.peers.group_frame import Grouped
from megatron_lowbit.codecs.peers.sdp4bit import turn_back
from megatron_lowbit.codecs.peers.systems import PEERS
from megatron_lowbit.kernels import select

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ROTATED = ["rotated-hybrid", "shaped-hybrid"]
GATHERED = ["static-hybrid", "scaled-hybrid"]  # the body without the BF16 features
GROUPED = list(PEERS)  # numbers for each group
ALL = [*ROTATED, *GATHERED, *GROUPED, "bf16"]
BITS = [1, 2, 3, 4, 5, 6]
STATIC_BITS = [3, 4, 5, 6, 8]
# One of each way to read a partial and to write a sum: the grouped differ in between.
WAYS = [ROTATED[0], *GATHERED, GROUPED[0], "bf16"]


@pytest.fixture(scope="module", autouse=True)
def triton_everywhere():
    """CPU tensors go the way of GPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(select, "_kind", lambda *tensors: "cuda")
            patch.setattr(select, "_trouble", lambda: "")
        yield


def tables_of(codec: Codec, hidden: int, kept: int, ranks: int = 3) -> Tables:
    generator = torch.Generator().manual_seed(hidden)
    index = torch.randperm(hidden, generator=generator)[: min(kept, hidden)]
    statistics = Statistics.of(sample("heavy-tailed", (ranks, 5, hidden), 1))
    return codec.tables(hidden, bf16_index=index, statistics=statistics).to(DEVICE)


def _same(got: Tensor, expected: Tensor, case: str) -> None:
    integer = {4: torch.int32, 2: torch.int16}[got.element_size()]
    bits = [x.contiguous().view(integer).masked_fill(x.isnan(), -1).cpu() for x in (got, expected)]
    assert got.dtype == expected.dtype and got.shape == expected.shape, case
    assert torch.equal(*bits), f"{case}: first at {(bits[0] != bits[1]).nonzero()[0].tolist()}"


def _same_payload(got: Tensor, expected: Tensor, codec: Codec, tables: Tables) -> None:
    case = f"{codec}, hidden {tables.hidden}"
    assert got.shape == expected.shape and got.dtype == torch.uint8 and got.is_contiguous(), case
    body = tables.hidden if tables.body_index is None else tables.body_index.numel()
    body = 0 if codec.name == "bf16" else wire.packed_bytes(body, codec.bits)
    assert torch.equal(got[:, :body], expected[:, :body]), f"{case}: codes differ"
    floats = [_numbers(payload, body, codec, tables) for payload in (got, expected)]
    for mine, right in zip(*floats, strict=True):
        _same(mine, right, case)


def _numbers(payload: Tensor, body: int, codec: Codec, tables: Tables) -> list[Tensor]:
    """Kind by kind as fp32, which tells all of their bits apart but those of a NaN."""
    if not isinstance(codec, Grouped):
        return [wire.split_row(payload, body)[1]]
    hidden, groups = tables.hidden, codec._groups(tables.hidden)[0]
    offsets = codec._offsets(hidden)
    spans = zip(codec._numbers(groups), itertools.pairwise(offsets), strict=True)
    found = [payload[:, body : offsets[0]].float()]  # padding
    for (dtype, _), (start, stop) in spans:
        found.append(payload[:, start:stop].flatten().clone().view(dtype).float())
    return found


def _check(codec: Codec, partials: list[Tensor], tables: Tables) -> Tensor:
    """Encode and sum `partials`, each step against plain torch; gives the payloads."""
    payloads = []
    for rank, partial in enumerate(partials):
        with kernels.disabled():
            expected = codec.encode(partial.cpu(), tables.to("cpu"), rank=rank)
        payloads.append(codec.encode(partial.to(DEVICE), tables, rank=rank))
        _same_payload(payloads[-1].cpu(), expected, codec, tables)
    payloads = torch.stack(payloads)
    _check_sums(codec, payloads, tables)
    return payloads


def _check_sums(codec: Codec, payloads: Tensor, tables: Tables, dtypes=(None,)) -> None:
    on_cpu = tables.to("cpu")
    with kernels.disabled():
        total = codec.decode_sum(payloads.cpu(), on_cpu)
    for dtype in dtypes:
        out = None if dtype is None else torch.empty(total.shape, dtype=dtype, device=DEVICE)
        got = codec.decode_sum(payloads, tables, out=out)
        assert out is None or got is out
        _same(got.cpu(), total.to(dtype or torch.float32), f"{codec}, {tables.hidden}, {dtype}")
    if codec.name in ROTATED:
        with kernels.disabled():
            of_sum = codec.reduce_encode(payloads.cpu(), on_cpu)
        got = codec.reduce_encode(payloads, tables).cpu()
        _same_payload(got, of_sum, codec.for_sum(), tables)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ROTATED)
def test_bits_of_the_rotated(name, bits):
    """Every number of bits in partials, and another one in the sum."""
    codec = get_codec(name, bits=(bits, 7 - bits))
    partials = [sample("heavy-tailed", (2, 96), seed).bfloat16() for seed in range(2)]
    _check(codec, partials, tables_of(codec, 96, 5))


@pytest.mark.parametrize("bits", STATIC_BITS)
def test_bits_of_static(bits):
    codec = get_codec("static-hybrid", bits=bits)
    partials = [sample("heavy-tailed", (2, 96), seed).bfloat16() for seed in range(2)]
    _check(codec, partials, tables_of(codec, 96, 5))


@pytest.mark.parametrize("bits", BITS[1:])
def test_bits_of_scaled(bits):
    codec = get_codec("scaled-hybrid", bits=bits)
    partials = [sample("heavy-tailed", (2, 96), seed).bfloat16() for seed in range(2)]
    _check(codec, partials, tables_of(codec, 96, 5))


@pytest.mark.parametrize(
    ("name", "bits"), [(n, b) for n in GROUPED for b in get_codec(n).supported_bits]
)
def test_bits_of_the_grouped(name, bits):
    """Two groups and a part of one."""
    codec = get_codec(name, bits=bits)
    hidden = 2 * (codec.group or 32) + 5
    partials = [sample("heavy-tailed", (1, hidden), seed).bfloat16() for seed in range(2)]
    _check(codec, partials, tables_of(codec, hidden, 0))


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
    """Rows that come rotated, with the BF16 features behind."""
    codec = get_codec(name)
    _, folded = fold(torch.ones(96, 2, device=DEVICE), tables_of(codec, 96, 5))
    partials = [sample("heavy-tailed", (2, 101), seed).bfloat16() for seed in range(2)]
    _check(codec, partials, folded)


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
    codec = get_codec(name)
    _check(codec, [sample("heavy-tailed", (1, 4096), 0).bfloat16()] * 2, tables_of(codec, 4096, 32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WAYS)
def test_types_and_strides(name, dtype):
    codec = get_codec(name)
    wide = sample("heavy-tailed", (48, 100), 3).to(dtype)
    tables = tables_of(codec, 48, 3)
    views = [wide[:4:2, 3:51], wide[:, :2].T, wide[:1, 4:52].expand(2, 48)]
    payloads = _check(codec, views, tables)
    _check_sums(codec, payloads[:, :1], tables, dtypes=DTYPES)
    row = payloads.shape[2]
    wider = torch.empty(3, 2, row + 3, dtype=torch.uint8, device=DEVICE)[..., 1 : row + 1]
    _check_sums(codec, wider.copy_(payloads), tables)  # and at odd addresses
    _check_sums(codec, payloads[2:].expand(3, 2, row), tables)
    _check_sums(codec, payloads.transpose(1, 2).contiguous().transpose(1, 2), tables)
    out = torch.zeros(48, 2, dtype=dtype, device=DEVICE)
    codec.decode_sum(payloads, tables, out=out.T)
    _same(out.T.cpu(), codec.decode_sum(payloads, tables).to(dtype).cpu(), "a transposed result")


@pytest.mark.parametrize("name", ALL)
def test_rows_that_are_not_finite(name):
    """Every feature in some token, all kinds in the body and in the BF16 features; and none.

    Of a group, whose features are alike to the kernels, the first, one between and the last.
    """
    codec = get_codec(name)
    tables = tables_of(codec, 12, 6)
    features = range(12) if name in (*ROTATED, *GATHERED) else (0, 5, 11)
    partials = [sample("normal", (len(features) + 1, 12), seed) for seed in range(2)]
    for token, feature in enumerate(features):
        partials[1][token, feature] = (torch.nan, torch.inf, -torch.inf)[token % 3]
    payloads = _check(codec, partials, tables)
    nan = codec.decode_sum(payloads, tables).isnan().any(dim=1)
    assert nan.tolist() == [True] * len(features) + [False]


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
    codec = get_codec(name)
    tables = tables_of(codec, 64, 1)
    row = codec.row_bytes(tables)
    try:
        far = torch.empty(2**32 + 4096, dtype=torch.uint8, device=DEVICE)  # reserved, not touched
    except RuntimeError:
        pytest.skip("no 4 GiB to reserve here")
    partial = far.view(torch.bfloat16).as_strided((2, 64), (2**31, 1))
    _check(codec, [partial.copy_(sample("normal", (2, 64), 0))], tables)
    for strides in ((2**32, row, 1), (row, 2**32, 1)):
        payloads = far.as_strided((2, 2, row), strides)
        _check_sums(codec, payloads.random_(0, 256), tables)
    out = far.view(torch.bfloat16).as_strided((2, 64), (2**31, 1))
    payloads = torch.zeros(1, 2, row, dtype=torch.uint8, device=DEVICE)
    codec.decode_sum(payloads, tables, out=out)
    _same(out.cpu(), codec.decode_sum(payloads, tables).bfloat16().cpu(), "a far result")
    columns = far.view(torch.bfloat16).as_strided((2, 65), (1, 2**25))
    tables = tables_of(codec, 65, 1)
    payloads = _check(codec, [columns.copy_(sample("normal", (2, 65), 0))], tables)
    codec.decode_sum(payloads, tables, out=columns)
    _same(columns.cpu(), codec.decode_sum(payloads, tables).bfloat16().cpu(), "a far column")


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
def test_a_graph_replays_with_other_inputs():
    codec = get_codec("rotated-hybrid")
    tables = tables_of(codec, 4096, 32)
    partial = sample("normal", (16, 4096), 0).bfloat16().to(DEVICE)
    out = torch.empty_like(partial)

    def work() -> None:
        codec.decode_sum(codec.encode(partial, tables).expand(2, -1, -1), tables, out=out)

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for seed in range(3):
        partial.copy_(sample("heavy-tailed", (16, 4096), seed))
        graph.replay()
        replayed = out.clone()
        work()
        assert torch.equal(out, replayed)
