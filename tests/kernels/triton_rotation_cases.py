"""The rotation on tensor cores: close to the butterflies' bits, and the same on every rank.

`test_triton_kernels` runs this as `triton_cases`: in the interpreter, or on a GPU.
"""

import pytest
import torch
from cases import sample
from torch import Tensor
from triton_cases import DEVICE, tables_of, triton_everywhere  # noqa: F401 (a fixture)

from megatron_lowbit import kernels
from megatron_lowbit.benchmark.codecs import codec_bench
from megatron_lowbit.benchmark.codecs.closeness import (
    MOST_CODES,
    MOST_DECIBELS,
    moved_codes,
    sqnr,
)
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.codecs.folding import fold
from megatron_lowbit.kernels import switches

TENSOR_CORES = switches.TENSOR_CORES
# Blocks of 64 and 1024 in a padded row, a block of all: 1, 2 and 3 products, some with butterflies.
HIDDEN = [576, 4096, 5120]


def _payloads(codec, partials: list[Tensor], tables) -> Tensor:
    return torch.stack([codec.encode(x, tables, rank=r) for r, x in enumerate(partials)])


@pytest.mark.parametrize("bits", [6, 4])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("kind", ["normal", "heavy-tailed"])
def test_both_bounds(kind, hidden, bits):
    """Of more than 20,000 values a payload, at the bits that most flip and at the default."""
    codec, ranks = get_codec("shaped-hybrid", bits=bits), 2
    tables = tables_of(codec, hidden, hidden // 128, ranks)
    partials = [sample(kind, (-(-24_000 // hidden), hidden), r).to(DEVICE) for r in range(ranks)]
    with kernels.disabled():
        expected = _payloads(codec, partials, tables)
    with switches.rotating_by(TENSOR_CORES):
        got = _payloads(codec, partials, tables)
        total = codec.decode_sum(got, tables)
    steps = torch.cat(
        [moved_codes(*pair, codec, tables) for pair in zip(got, expected, strict=True)]
    )
    assert steps.numel() >= 40_000 and steps.max() <= 1
    share = steps.count_nonzero().item() / steps.numel()
    assert share <= MOST_CODES, f"{share:.1e} of the codes differ"
    with kernels.disabled():
        right = codec.decode_sum(expected, tables)
        of_its_own = codec.decode_sum(got, tables)
    exact = torch.stack(partials).double().sum(dim=0)
    ratios = [sqnr(exact, x) for x in (total, right)]
    assert abs(ratios[0] - ratios[1]) <= MOST_DECIBELS, ratios
    assert sqnr(of_its_own, total) > 120  # decoding alone: nearly fp32
    assert not torch.equal(of_its_own, total)  # so it was another rotation


def test_the_norm_decodes_as_the_sum():
    """The same rotation in `decode_sum_norm`: ranks may use either."""
    codec = get_codec("rotated-hybrid")
    tables = tables_of(codec, 576, 4)
    payloads = codec.encode(sample("normal", (3, 576), 0).to(DEVICE), tables)[None]
    weight = torch.ones(576, device=DEVICE)
    with switches.rotating_by(TENSOR_CORES):
        _, total = codec.decode_sum_norm(payloads, tables, weight=weight, epsilon=1e-5)
        assert torch.equal(total, codec.decode_sum(payloads, tables))
    assert not torch.equal(total, codec.decode_sum(payloads, tables))


@pytest.mark.parametrize("hidden", [1, 48, 96, 128, 264, 20480])
def test_what_does_not_fit_is_left_to_butterflies(hidden):
    """Rows of less than 16 x 16 values or more than 16384, and blocks of less than 16."""
    codec = get_codec("shaped-hybrid")
    tables = tables_of(codec, hidden, 2)
    partial = sample("normal", (3, hidden), 0).to(DEVICE)
    payloads = codec.encode(partial, tables)[None]
    with switches.rotating_by(TENSOR_CORES):
        assert torch.equal(codec.encode(partial, tables)[None], payloads)
        got = codec.decode_sum(payloads, tables)
    assert torch.equal(got, codec.decode_sum(payloads, tables))


def test_what_is_exact_stays_so():
    """Sums of small integers, and rows that come rotated."""
    codec = get_codec("rotated-hybrid")
    tables = tables_of(codec, 512, 3)
    whole = (sample("normal", (4, 512), 0) * 20).round().to(DEVICE)
    _, folded = fold(torch.ones(512, 2, device=DEVICE), tables)
    wide = sample("heavy-tailed", (4, 515), 1).to(DEVICE)
    for partial, made_by in ((whole, tables), (wide, folded)):
        payload = codec.encode(partial, made_by)
        with switches.rotating_by(TENSOR_CORES):
            assert torch.equal(codec.encode(partial, made_by), payload)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_alone(bad):
    codec = get_codec("rotated-hybrid")
    tables = tables_of(codec, 576, 0)  # nothing apart: all go through the products
    partial = sample("normal", (3, 576), 0).to(DEVICE)
    partial[1, 7] = bad
    with switches.rotating_by(TENSOR_CORES):
        total = codec.decode_sum(codec.encode(partial, tables)[None], tables)
    assert total.isnan().any(dim=1).tolist() == [False, True, False]
    assert total[1].isnan().all()


def test_the_benchmark_measures_both(monkeypatch):
    monkeypatch.setitem(codec_bench._COPY_BYTES, DEVICE, 1 << 20)
    plan = codec_bench.Plan(
        codecs=("rotated-hybrid-4", "scaled-hybrid"),
        shapes=[(2, 256)],
        ranks=2,
        seconds=0.001,
        device=torch.device(DEVICE),
    )
    rows = codec_bench.run(plan, lambda text: None)
    on_tensor_cores = {
        (row["codec"], row["operation"]) for row in rows if row["path"] == "tensor-cores"
    }
    operations = ("encode", "decode_sum of 2", "encode + decode_sum of 2")
    assert on_tensor_cores == {("rotated-hybrid-4", operation) for operation in operations}
    assert {row["operation"] for row in rows if row["path"] == "kernel"} > set(operations)
