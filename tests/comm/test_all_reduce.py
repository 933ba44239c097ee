"""What `all_reduce` and its siblings do besides summing: gradients, strides, errors, agreement.

The sums themselves are tested in test_collectives.py.
"""

import re

import pytest
import torch
import torch.distributed as dist
from cases import sample
from ranks import on_each_rank

from megatron_lowbit.codecs import Statistics, get_codec
from megatron_lowbit.comm import all_gather, all_reduce, reduce_scatter, transport
from megatron_lowbit.comm.agreement import on_every_rank, require_equal
from megatron_lowbit.errors import LowbitError

MODES = ("native", "one-shot", "two-shot")


@on_each_rank(1, 2, 3, 4)
def test_every_rank_has(rank):
    """In one group, since starting it is what takes time."""
    ranks = dist.get_world_size()
    _gradients(rank, ranks)
    _the_backends_own_sum(rank)
    _uneven_blocks(rank, ranks)
    _tokens_that_do_not_depend_on_their_batch(rank)
    _nan_of_one_rank_in_its_token_only(rank, ranks)
    _errors(rank, ranks)
    if ranks > 1:
        _errors_of_several(rank, ranks)


def _gradients(rank: int, ranks: int) -> None:
    """Backward is the identity, and of the sequence-parallel pair each is the other's."""
    x = sample("normal", (48, 6), rank).T.requires_grad_()
    total = all_reduce(x, codec="rotated-hybrid")
    (3 * total).sum().backward()
    assert torch.equal(x.grad, torch.full((6, 48), 3.0))
    assert torch.equal(x, sample("normal", (48, 6), rank).T), "its input was changed"
    assert torch.equal(total, all_reduce(x.detach().contiguous(), codec="rotated-hybrid"))

    x = sample("normal", (2 * ranks, 48), rank).requires_grad_()
    mine = reduce_scatter(x)
    mine.backward(torch.full_like(mine, rank + 1.0))
    gathered = torch.arange(1.0, ranks + 1).repeat_interleave(2)
    assert torch.equal(x.grad, gathered[:, None].expand(-1, 48))
    shard = sample("normal", (2, 48), rank).requires_grad_()
    whole = all_gather(shard)
    whole.backward(torch.arange(2.0 * ranks)[:, None].expand_as(whole).contiguous())
    scattered = ranks * torch.arange(2.0 * rank, 2 * rank + 2)
    assert torch.equal(shard.grad, scattered[:, None].expand(-1, 48))


def _the_backends_own_sum(rank: int) -> None:
    x = sample("normal", (48, 6), rank).T
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    assert torch.equal(all_reduce(x, collective="native"), total)


def _uneven_blocks(rank: int, ranks: int) -> None:
    """Blocks of any sizes, none for the last of several ranks, in one chunk and in many."""
    counts = [5 + 3 * r for r in range(ranks)]
    counts[-1] = counts[-1] if ranks == 1 else 0
    start, stop = sum(counts[:rank]), sum(counts[: rank + 1])
    chunk_values = transport.CHUNK_VALUES
    for transport.CHUNK_VALUES in (96, chunk_values):
        x = sample("heavy-tailed", (sum(counts), 2, 48), rank).requires_grad_()
        mine = reduce_scatter(x, counts=counts)
        mine.backward(torch.full_like(mine, rank + 1.0))
        blocks = [torch.full((n, 2, 48), r + 1.0) for r, n in enumerate(counts)]
        whole = all_reduce(x.detach(), collective="one-shot")
        assert torch.equal(mine, whole[start:stop])
        assert torch.equal(x.grad, torch.cat(blocks))


def _tokens_that_do_not_depend_on_their_batch(rank: int) -> None:
    """In a fixed mode a token's sum has the same bits in a batch of any size and at any place."""
    tokens = sample("heavy-tailed", (67, 96), rank)
    for collective in ("one-shot", "two-shot"):
        for codec in ("rotated-hybrid", "int4-g32", "bf16"):
            call = {"codec": codec, "collective": collective}
            whole = all_reduce(tokens, **call)
            for start, stop in ((0, 1), (66, 67), (3, 5), (10, 41), (0, 66)):
                part = all_reduce(tokens[start:stop], **call)
                assert torch.equal(part, whole[start:stop]), (call, start)


def _nan_of_one_rank_in_its_token_only(rank: int, ranks: int) -> None:
    x = sample("normal", (4, 48), rank)
    x[2, 3] = torch.nan if rank == ranks - 1 else 1.0
    for mode in ("one-shot", "two-shot"):
        nan = all_reduce(x, collective=mode).isnan()
        assert nan.any(dim=1).tolist() == [False, False, True, False], mode


def _refused(message: str, function, *args, **call) -> None:
    with pytest.raises(LowbitError, match=re.escape(message)):
        function(*args, **call)


def _of_five_ranks() -> dict:
    statistics = Statistics(ranges=torch.ones(5, 48))
    return {
        "codec": "static-hybrid",
        "tables": get_codec("static-hybrid").tables(48, statistics=statistics),
    }


def _errors(rank: int, ranks: int) -> None:
    x, bf16 = torch.ones(6, 48), get_codec("bf16")

    def fail_on_last() -> None:
        if rank == ranks - 1:
            raise ValueError("disk on fire")

    _refused("disk on fire", on_every_rank, fail_on_last)
    _refused("int64", all_reduce, torch.ones(2, 4, dtype=torch.int64))
    _refused("shape ()", all_reduce, torch.tensor(1.0))
    _refused("hidden size 5", all_reduce, x, tables=bf16.tables(5), codec="bf16")
    other = "tables are of codec bf16, the codec is rotated-hybrid"
    _refused(other, all_reduce, x, tables=bf16.tables(48))
    five = f"tables are for 5 ranks, the group has {ranks}"
    _refused(five, all_reduce, x, **_of_five_ranks())
    unknown = "unknown collective 'ring': choose one of auto, native"
    _refused(unknown, all_reduce, x, collective="ring")
    _refused("make_policy", all_reduce, x, collective="auto")
    counts = f"counts {[3] * ranks} do not split 2 tokens over {ranks} ranks: give one a rank"
    _refused(counts, reduce_scatter, torch.ones(2, 8), counts=[3] * ranks)


def _errors_of_several(rank: int, ranks: int) -> None:
    x, shaped, static = torch.ones(6, 48), get_codec("shaped-hybrid"), get_codec("static-hybrid")
    _refused("rank 0 has 0, rank 1 has 1", require_equal, "codec", min(rank, 1))
    _refused("divide", reduce_scatter, torch.ones(2 * ranks + 1, 8))
    centres = shaped.tables(48, statistics=Statistics.of(torch.arange(5 * 3 * 48.0).view(5, 3, 48)))
    five = f"tables are for 5 ranks, the group has {ranks}"
    _refused(five, all_reduce, x, codec=shaped, tables=centres)
    tables = static.tables(48, statistics=Statistics(ranges=torch.ones(ranks, 48)))
    without = {"codec": static, "tables": tables, "collective": "two-shot"}
    _refused("no calibrated statistics of the sum", all_reduce, x, **without)


@on_each_rank(2)
def test_inference_mode_may_come_and_go(rank):
    """Buffers that inference mode allocated serve outside it, and the other way round."""
    x = sample("normal", (8, 48), rank)
    with torch.inference_mode():
        first = all_reduce(x, collective="two-shot")
    second = all_reduce(x.requires_grad_(), collective="two-shot")
    assert torch.equal(first, second.detach())


@on_each_rank(3)
def test_in_place_gives_the_same_sum(rank):
    for mode in MODES:
        x = sample("normal", (300, 96), rank).bfloat16()
        expected = all_reduce(x, collective=mode)
        assert not torch.equal(x, expected), f"{mode} changed its input"
        assert torch.equal(all_reduce(x, collective=mode), expected)
        assert all_reduce(x, collective=mode, in_place=True) is x
        assert torch.equal(x, expected), f"{mode} in place is another sum"
        strided = sample("normal", (96, 8), rank).T
        all_reduce(strided, collective=mode, in_place=True)
        assert torch.equal(strided, sample("normal", (96, 8), rank).T), mode
