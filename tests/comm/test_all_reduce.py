"""The one-shot all-reduce in real process groups of 1 to 4 ranks, against one process."""

import pytest
import torch
import torch.distributed as dist
from cases import CODECS, DTYPES, SHAPES, reference_sum, sample, tables_for
from ranks import run_ranks

from megatron_lowbit.codecs import get_codec
from megatron_lowbit.comm import all_reduce
from megatron_lowbit.comm.agreement import on_every_rank, require_equal
from megatron_lowbit.comm.all_reduce import Traffic
from megatron_lowbit.errors import LowbitError

CASES = [(c, shape, dtype) for c in CODECS for shape in SHAPES for dtype in DTYPES]


def _partials(case: int, ranks: int) -> list[torch.Tensor]:
    _, shape, dtype = CASES[case]
    return [sample("heavy-tailed", shape, 100 * case + rank).to(dtype) for rank in range(ranks)]


def _tables(case: int, ranks: int):
    (name, bits), _, _ = CASES[case]
    codec = get_codec(name, bits=bits)
    partials = _partials(case, ranks)
    return codec, tables_for(codec, partials, min(2, partials[0].shape[-1]))


def _reduce_all(rank: int) -> dict:
    ranks = dist.get_world_size()
    sums, traffics = [], []
    for case in range(len(CASES)):
        codec, tables = _tables(case, ranks)
        traffic = Traffic()
        mine = _partials(case, ranks)[rank]
        sums.append(all_reduce(mine, codec=codec, tables=tables, traffic=traffic))
        traffics.append(traffic)
    return {"sums": sums, "traffic": traffics, "more": _more(rank, ranks)}


def _more(rank: int, ranks: int) -> dict:
    """Backward, strided input, input left alone, repeated calls, a sub-group, errors."""
    x = sample("normal", (48, 6), rank).T.requires_grad_()
    total = all_reduce(x, codec="rotated-hybrid")
    (3 * total).sum().backward()
    contiguous = all_reduce(x.detach().contiguous(), codec="rotated-hybrid")
    nan = sample("normal", (4, 48), rank)
    nan[2, 3] = torch.nan if rank == ranks - 1 else 1.0
    return {
        "gradient": x.grad,
        "same": torch.equal(total, contiguous),
        "untouched": torch.equal(x, sample("normal", (48, 6), rank).T),
        "nan": all_reduce(nan),
        "agreement": _error(lambda: require_equal("codec", min(rank, 1))),
        "failure": _error(lambda: on_every_rank(lambda: _fail_on_last(rank, ranks))),
        "dtype": _error(lambda: all_reduce(torch.ones(2, 4, dtype=torch.int64))),
        "hidden": _error(lambda: all_reduce(x, tables=get_codec("bf16").tables(5), codec="bf16")),
        "codec": _error(lambda: all_reduce(x, tables=get_codec("bf16").tables(48))),
        "ranks": _error(lambda: all_reduce(x, tables=_five_ranks(), codec="static-hybrid")),
        "scalar": _error(lambda: all_reduce(torch.tensor(1.0))),
    }


def _five_ranks():
    return get_codec("static-hybrid").tables(48, ranges=torch.ones(5, 48))


def _fail_on_last(rank: int, ranks: int) -> None:
    if rank == ranks - 1:
        raise ValueError("disk on fire")


def _error(step) -> str:
    try:
        step()
    except LowbitError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def results(request, tmp_path_factory):
    return run_ranks(request.param, _reduce_all, tmp_path_factory.mktemp("ranks"))


def test_equals_one_process_exactly_on_every_rank(results):
    ranks = len(results)
    for case, (codec_bits, shape, dtype) in enumerate(CASES):
        codec, tables = _tables(case, ranks)
        expected = reference_sum(codec, _partials(case, ranks), tables)
        if ranks == 1:
            expected = _partials(case, ranks)[0]  # nothing is sent, nothing is lost
        for rank, result in enumerate(results):
            got = result["sums"][case]
            assert got.dtype == dtype
            assert got.shape == shape
            assert torch.equal(got, expected), f"{codec_bits} {shape} {dtype} on rank {rank}"


def test_traffic_is_what_was_sent(results):
    ranks = len(results)
    for case, ((name, bits), shape, _) in enumerate(CASES):
        codec, tables = _tables(case, ranks)
        tokens = torch.Size(shape[:-1]).numel()
        for result in results:
            traffic = result["traffic"][case]
            if ranks == 1:
                assert traffic == Traffic()
                continue
            payload = tokens * codec.row_bytes(tables)
            expected = Traffic(1, tokens, tokens * shape[-1], payload, (ranks - 1) * payload)
            assert traffic == expected, (name, bits, shape)


def test_backward_is_the_identity(results):
    for result in results:
        assert torch.equal(result["more"]["gradient"], torch.full((6, 48), 3.0))


def test_strided_input_is_taken_and_left_alone(results):
    assert all(result["more"]["same"] and result["more"]["untouched"] for result in results)


def test_nan_on_one_rank_reaches_all_and_its_token_only(results):
    if len(results) == 1:
        return
    for result in results:
        bad = result["more"]["nan"].isnan().any(dim=1)
        assert bad.tolist() == [False, False, True, False]


def test_errors_come_on_every_rank(results):
    several = len(results) > 1
    for result in results:
        more = result["more"]
        assert "disk on fire" in more["failure"]
        assert ("rank 0 has 0, rank 1 has 1" in more["agreement"]) == several
        assert "int64" in more["dtype"]
        assert "hidden size 5" in more["hidden"]
        assert "shape ()" in more["scalar"]
        assert "tables are of codec bf16, the codec is rotated-hybrid" in more["codec"]
        assert f"tables are for 5 ranks, the group has {len(results)}" in more["ranks"]
