"""What `all_reduce` and its siblings do besides summing: gradients, strides, errors, agreement.

The sums themselves are tested in test_collectives.py.
"""

import pytest
import torch
import torch.distributed as dist
from cases import sample
from ranks import run_ranks
from worker import error_of

from megatron_lowbit.codecs import Statistics, get_codec
from megatron_lowbit.comm import all_gather, all_reduce, reduce_scatter, transport
from megatron_lowbit.comm.agreement import on_every_rank, require_equal


def _more(rank: int) -> dict:
    """Backward, strided input, input left alone, repeated calls, a sub-group, errors."""
    ranks = dist.get_world_size()
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
        "nan": {mode: all_reduce(nan, collective=mode) for mode in ("one-shot", "two-shot")},
        "native": torch.equal(all_reduce(x.detach(), collective="native"), _native(x.detach())),
        "scattered": _scatter_gradient(rank, ranks),
        "uneven_blocks": _uneven_blocks(rank, ranks),
        "counts": error_of(lambda: reduce_scatter(torch.ones(2, 8), counts=[3] * ranks)),
        "batches": _batches(rank),
        "mode": error_of(lambda: all_reduce(x, collective="ring")),
        "auto": error_of(lambda: all_reduce(x, collective="auto")),
        "uneven": error_of(lambda: reduce_scatter(torch.ones(2 * ranks + 1, 8))),
        "no_ranges": error_of(lambda: all_reduce(x, collective="two-shot", **_without_sum(ranks))),
        "agreement": error_of(lambda: require_equal("codec", min(rank, 1))),
        "failure": error_of(lambda: on_every_rank(lambda: _fail_on_last(rank, ranks))),
        "dtype": error_of(lambda: all_reduce(torch.ones(2, 4, dtype=torch.int64))),
        "hidden": error_of(lambda: all_reduce(x, tables=get_codec("bf16").tables(5), codec="bf16")),
        "codec": error_of(lambda: all_reduce(x, tables=get_codec("bf16").tables(48))),
        "ranks": error_of(lambda: all_reduce(x, tables=_five_ranks(), codec="static-hybrid")),
        "centres": error_of(lambda: all_reduce(x, tables=_five_centres(), codec="shaped-hybrid")),
        "scalar": error_of(lambda: all_reduce(torch.tensor(1.0))),
    }


def _native(x: torch.Tensor) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _scatter_gradient(rank: int, ranks: int) -> dict:
    """Gradients of the sequence-parallel pair: each must be the other's counterpart."""
    x = sample("normal", (2 * ranks, 48), rank).requires_grad_()
    mine = reduce_scatter(x)
    mine.backward(torch.full_like(mine, rank + 1.0))
    shard = sample("normal", (2, 48), rank).requires_grad_()
    whole = all_gather(shard)
    whole.backward(torch.arange(2.0 * ranks)[:, None].expand_as(whole).contiguous())
    return {"reduce_scatter": x.grad, "all_gather": shard.grad}


def _uneven_blocks(rank: int, ranks: int) -> list[bool]:
    """Blocks of any sizes, none for the last of several ranks, in one chunk and in many."""
    counts = [5 + 3 * r for r in range(ranks)]
    counts[-1] = counts[-1] if ranks == 1 else 0
    start, stop = sum(counts[:rank]), sum(counts[: rank + 1])
    same, chunk_values = [], transport.CHUNK_VALUES
    for transport.CHUNK_VALUES in (chunk_values, 96):
        x = sample("heavy-tailed", (sum(counts), 2, 48), rank).requires_grad_()
        mine = reduce_scatter(x, counts=counts)
        mine.backward(torch.full_like(mine, rank + 1.0))
        blocks = [torch.full((n, 2, 48), r + 1.0) for r, n in enumerate(counts)]
        whole = all_reduce(x.detach(), collective="one-shot")
        same += [torch.equal(mine, whole[start:stop]), torch.equal(x.grad, torch.cat(blocks))]
    transport.CHUNK_VALUES = chunk_values
    return same


def _batches(rank: int) -> bool:
    """In a fixed mode a token's sum has the same bits in a batch of any size and at any place."""
    tokens = sample("heavy-tailed", (67, 96), rank)
    for mode in ("one-shot", "two-shot"):
        for codec in ("rotated-hybrid", "int4-g32", "bf16"):
            whole = all_reduce(tokens, codec=codec, collective=mode)
            for start, stop in ((0, 1), (66, 67), (3, 5), (10, 41), (0, 66)):
                part = all_reduce(tokens[start:stop], codec=codec, collective=mode)
                if not torch.equal(part, whole[start:stop]):
                    return False
    return True


def _without_sum(ranks: int) -> dict:
    codec = get_codec("static-hybrid")
    return {
        "codec": codec,
        "tables": codec.tables(48, statistics=Statistics(ranges=torch.ones(ranks, 48))),
    }


def _five_ranks():
    return get_codec("static-hybrid").tables(48, statistics=Statistics(ranges=torch.ones(5, 48)))


def _five_centres():
    statistics = Statistics.of(torch.arange(5 * 3 * 48.0).view(5, 3, 48))
    return get_codec("shaped-hybrid").tables(48, statistics=statistics)


def _fail_on_last(rank: int, ranks: int) -> None:
    if rank == ranks - 1:
        raise ValueError("disk on fire")


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def results(request, tmp_path_factory):
    return run_ranks(request.param, _more, tmp_path_factory.mktemp("ranks"))


def test_backward_is_the_identity(results):
    for more in results:
        assert torch.equal(more["gradient"], torch.full((6, 48), 3.0))


def test_backward_of_the_sequence_parallel_pair(results):
    """reduce-scatter: an all-gather of the gradients; all-gather: a reduce-scatter of them."""
    ranks = len(results)
    gathered = torch.arange(1.0, ranks + 1).repeat_interleave(2)[:, None].expand(-1, 48)
    for rank, more in enumerate(results):
        assert torch.equal(more["scattered"]["reduce_scatter"], gathered)
        mine = ranks * torch.arange(2.0 * rank, 2 * rank + 2)[:, None].expand(-1, 48)
        assert torch.equal(more["scattered"]["all_gather"], mine)


def test_a_reduce_scatter_into_uneven_blocks(results):
    """The bits of the all-reduce; the gradients of all blocks in their places."""
    for more in results:
        assert more["uneven_blocks"] == [True] * 4
        ranks = len(results)
        said = f"counts {[3] * ranks} do not split 2 tokens over {ranks} ranks: give one a rank"
        assert more["counts"].startswith(said)


def test_strided_input_is_taken_and_left_alone(results):
    assert all(more["same"] and more["untouched"] for more in results)


def test_native_is_the_backends_own(results):
    assert all(more["native"] for more in results)


def test_a_token_does_not_depend_on_its_batch(results):
    assert all(more["batches"] for more in results)


def test_nan_on_one_rank_reaches_all_and_its_token_only(results):
    if len(results) == 1:
        return
    for more in results:
        for mode, out in more["nan"].items():
            assert out.isnan().any(dim=1).tolist() == [False, False, True, False], mode


def test_errors_come_on_every_rank(results):
    several = len(results) > 1
    for more in results:
        assert "disk on fire" in more["failure"]
        assert ("rank 0 has 0, rank 1 has 1" in more["agreement"]) == several
        assert "int64" in more["dtype"]
        assert "hidden size 5" in more["hidden"]
        assert "shape ()" in more["scalar"]
        assert "tables are of codec bf16, the codec is rotated-hybrid" in more["codec"]
        assert f"tables are for 5 ranks, the group has {len(results)}" in more["ranks"]
        assert "unknown collective 'ring': choose one of auto, native" in more["mode"]
        assert "make_policy" in more["auto"]
        if several:
            assert "divide" in more["uneven"]
            assert more["centres"] == more["ranks"]
            assert "no calibrated statistics of the sum" in more["no_ranges"]


def _modes(rank: int) -> bool:
    """Buffers that inference mode allocated serve outside it, and the other way round."""
    x = sample("normal", (8, 48), rank)
    with torch.inference_mode():
        first = all_reduce(x, collective="two-shot")
    second = all_reduce(x.requires_grad_(), collective="two-shot")
    return torch.equal(first, second.detach())


def test_inference_mode_may_come_and_go(tmp_path):
    assert all(run_ranks(2, _modes, tmp_path))


def _in_place(rank: int) -> list[str]:
    """What is wrong with sums in place."""
    wrong = []
    for mode in ("native", "one-shot", "two-shot"):
        x = sample("normal", (300, 96), rank).bfloat16()
        expected = all_reduce(x, collective=mode)
        if torch.equal(x, expected) or torch.equal(x, all_reduce(x, collective=mode)):
            wrong.append(f"{mode} changed its input")
        if all_reduce(x, collective=mode, in_place=True) is not x or not torch.equal(x, expected):
            wrong.append(f"{mode} in place is another sum, or elsewhere")
        strided = sample("normal", (96, 8), rank).T
        all_reduce(strided, collective=mode, in_place=True)
        if not torch.equal(strided, sample("normal", (96, 8), rank).T):
            wrong.append(f"{mode} changed a strided input")
    return wrong


def test_in_place_gives_the_same_sum(tmp_path):
    assert run_ranks(3, _in_place, tmp_path) == [[], [], []]
