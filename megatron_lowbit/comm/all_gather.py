"""The all-gather in low bits: every rank's tokens on all ranks, each through one quantization.

The counterpart of the reduce-scatter, for the input of the next column-parallel layer. The gradient
of a block is the sum of all ranks' gradients of it. What holds for every collective is in
`comm.call`.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import DEFAULT_CODEC, Codec, Tables
from megatron_lowbit.comm import transport
from megatron_lowbit.comm.call import Call, public, run
from megatron_lowbit.comm.traffic import Clock, Decision, Traffic
from megatron_lowbit.comm.transport import Channel, Steps, chunks

_SLOTS = 3


@public
def all_gather(
    x: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    codec: str | Codec = DEFAULT_CODEC,
    tables: Tables | None = None,
    traffic: Traffic | None = None,
) -> Tensor:
    """Put the `x` of all ranks together along the first axis, with low-bit payloads on the wire.

    Args:
        x: bf16, fp16 or fp32 ``[sequence / ranks, ..., hidden]``, of the same shape on every rank.
        group: As for `all_reduce`.
        codec: As for `all_reduce`.
        tables: As for `all_reduce`.
        traffic: Counters to add this call to.

    Returns:
        ``[sequence, ..., hidden]`` of `x`'s dtype, bit-identical on all ranks.

    Raises:
        LowbitError: As `all_reduce`.
    """
    call = Call(x, group, codec, tables, "one-shot", traffic)
    return x if call.ranks == 1 else run(_AllGather, x, call)


class _AllGather(torch.autograd.Function):
    """All ranks' blocks; the gradient of a block is the sum of all ranks' gradients of it."""

    @staticmethod
    def forward(ctx, x, call):
        if ctx is not None:
            ctx.group = call.group
        clock = Clock(x.device)
        shard = x.reshape(-1, x.shape[-1])
        out = x.new_empty(call.ranks * x.shape[0], *x.shape[1:])
        rows = out.view(call.ranks * len(shard), x.shape[-1])
        sent = gather_rows(shard, call.tables, codec=call.codec, group=call.group, out=rows)
        payload = call.payload_bytes("all-gather", len(shard))
        call.count(Decision("all-gather", "fixed"), x, payload, sent, clock)
        return out

    @staticmethod
    def backward(ctx, grad):
        mine = grad.new_empty(grad.shape[0] // dist.get_world_size(ctx.group), *grad.shape[1:])
        transport.native_reduce_scatter(mine, grad.contiguous(), group=ctx.group)
        return mine, None


def gather_rows(
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
    return transport.run(
        _gather_steps(shard[a:b], tables, codec, Channel(group, i % _SLOTS), blocks[:, a:b])
        for i, (a, b) in enumerate(spans)
    )


def _gather_steps(
    shard: Tensor, tables: Tables, codec: Codec, channel: Channel, out: Tensor
) -> Steps:
    gather = channel.gather(len(shard), codec.row_bytes(tables), shard.device)
    yield None
    yield gather.send(codec.encode(shard, tables, rank=channel.rank))
    for rank, rows in enumerate(gather.received):
        codec.decode_sum(rows[None], tables.of_ranks(rank, rank + 1), out=out[rank])
