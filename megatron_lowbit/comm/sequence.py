"""Reduce-scatter for sequence parallelism: each rank gets the sum of its own tokens.

The first half of two-shot: an all-to-all of payload rows, then the owner decodes and sums its own.
One quantization. `all_gather` is the counterpart, which brings every rank's tokens to all in low
bits, for the input of the next column-parallel layer.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import Codec, Tables
from megatron_lowbit.comm.transport import Channel, Steps, chunks, run

_SLOTS = 3


def reduce_scatter(
    partial: Tensor,
    tables: Tables,
    *,
    codec: Codec,
    group: dist.ProcessGroup,
    counts: list[int],
    out: Tensor,
) -> int:
    """Sum `partial` over the ranks of `group`, each rank its own block of tokens.

    Args:
        partial: Floating point ``[tokens, hidden]``, the same shape on every rank.
        tables: Of this sync point, the same on every rank.
        codec: The same on every rank.
        group: Any backend that exchanges uint8.
        counts: Tokens of each rank's block, in order; the same on every rank.
        out: ``[counts[rank], hidden]`` of any float dtype: the sum of this rank's block.

    Returns:
        The bytes that this rank sent.
    """
    blocks = partial.split(counts)
    spans = chunks(max(counts), partial.shape[1], 1)
    return run(
        _reduce_steps(
            # Where it is all in one chunk the blocks are together already.
            partial if len(spans) == 1 else torch.cat([block[a:b] for block in blocks]),
            [len(block[a:b]) for block in blocks],
            tables,
            codec,
            Channel(group, i % _SLOTS),
            out[a:b],
        )
        for i, (a, b) in enumerate(spans)
    )


def all_gather(
    shard: Tensor, tables: Tables, *, codec: Codec, group: dist.ProcessGroup, out: Tensor
) -> int:
    """Bring the tokens of every rank to all ranks, each through one quantization.

    Args:
        shard: Floating point ``[tokens, hidden]``, the same shape on every rank.
        tables: The same on every rank.
        codec: The same on every rank.
        group: Any backend that gathers uint8.
        out: ``[ranks * tokens, hidden]`` of any float dtype: the shards in rank order,
            bit-identical on all ranks, the own one included.

    Returns:
        The bytes that this rank sent.
    """
    ranks, hidden = dist.get_world_size(group), shard.shape[1]
    blocks = out.view(ranks, len(shard), hidden)
    spans = chunks(len(shard), hidden, 1)
    return run(
        _gather_steps(shard[a:b], tables, codec, Channel(group, i % _SLOTS), blocks[:, a:b])
        for i, (a, b) in enumerate(spans)
    )


def _reduce_steps(
    rows: Tensor, counts: list[int], tables: Tables, codec: Codec, channel: Channel, out: Tensor
) -> Steps:
    exchange = channel.exchange_blocks(counts, codec.row_bytes(tables), rows.device)
    yield
    yield exchange.send(codec.encode(rows, tables, rank=channel.rank))
    codec.decode_sum(exchange.received, tables, out=out)


def _gather_steps(
    shard: Tensor, tables: Tables, codec: Codec, channel: Channel, out: Tensor
) -> Steps:
    gather = channel.gather(len(shard), codec.row_bytes(tables), shard.device)
    yield
    yield gather.send(codec.encode(shard, tables, rank=channel.rank))
    for rank, rows in enumerate(gather.received):
        codec.decode_sum(rows[None], tables.of_ranks(rank, rank + 1), out=out[rank])
