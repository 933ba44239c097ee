"""The reduce-scatter in low bits, for sequence parallelism: each rank sums its own tokens.

The first half of two-shot: an all-to-all of payload rows, then the owner decodes and sums its own.
One quantization. The gradients of all blocks, gathered, are every rank's gradient. What holds for
every collective is in `comm.call`.
"""

import itertools
import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import DEFAULT_CODEC, Codec, Tables
from megatron_lowbit.codecs.carry import NO_CARRY, Carry
from megatron_lowbit.comm import transport
from megatron_lowbit.comm.call import Call, check_counts, public, run
from megatron_lowbit.comm.feedback.chain import Feedback
from megatron_lowbit.comm.feedback.ways import SKIPPED, native_input, partial_carry, skip
from megatron_lowbit.comm.policy.policy import Policy
from megatron_lowbit.comm.traffic import Clock, Traffic
from megatron_lowbit.comm.transport import Channel, Steps, chunks
from megatron_lowbit.errors import LowbitError

_SLOTS = 3


@public
def reduce_scatter(
    x: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    codec: str | Codec = DEFAULT_CODEC,
    tables: Tables | None = None,
    collective: str | Policy = "one-shot",
    traffic: Traffic | None = None,
    counts: list[int] | None = None,
    feedback: Feedback | None = None,
) -> Tensor:
    """Sum `x` over the ranks of `group`; each rank gets its share of the first axis.

    Args:
        x: bf16, fp16 or fp32 ``[sequence, ..., hidden]``, of the same shape on every rank; the
            number of ranks divides `sequence`, if `counts` is left out.
        group: As for `all_reduce`.
        codec: As for `all_reduce`.
        tables: As for `all_reduce`.
        collective: ``native``: the backend's own. Any other: in low bits, quantized once.
        traffic: Counters to add this call to.
        counts: How much of the first axis each rank gets, the same on every rank; equal shares if
            left out. Only in low bits.
        feedback: As for `all_reduce`.

    Returns:
        ``[sequence / ranks, ..., hidden]`` (or ``[counts[rank], ...]``) of `x`'s dtype: this rank's
        block of the sum.

    Raises:
        LowbitError: As `all_reduce`, or the ranks do not divide `sequence`, or `counts` is not one
            count a rank that together make `sequence`.
    """
    call = Call(x, group, codec, tables, collective, traffic, feedback)
    if x.ndim < 2 or (counts is None and x.shape[0] % call.ranks):
        raise LowbitError(
            f"reduce_scatter needs [sequence, ..., hidden] with a sequence that {call.ranks} ranks "
            f"divide, got {tuple(x.shape)}"
        )
    call.counts = [x.shape[0] // call.ranks] * call.ranks if counts is None else counts
    check_counts(call.counts, x.shape[0], call.ranks)
    return x if call.ranks == 1 else run(_ReduceScatter, x, call)


class _ReduceScatter(torch.autograd.Function):
    """This rank's block of the sum; the gradients of all blocks, together, are everyone's."""

    @staticmethod
    def forward(ctx, x, call):
        if ctx is not None:
            ctx.group, ctx.counts = call.group, call.counts
        clock, decision = Clock(x.device), call.policy.reduce_scatter(x.numel())
        step, own = call.step(x), call.counts[dist.get_rank(call.group)]
        out = call.output(x[:own])
        if call.codec.bits == 0:
            first = sum(call.counts[: dist.get_rank(call.group)]) * math.prod(x.shape[1:-1])
            skip(call, step, x, out, first=first)
            call.count(SKIPPED, x, 0, 0, clock)
            return out
        if decision.collective == "native reduce-scatter":
            if len(set(call.counts)) > 1:
                raise LowbitError(
                    f"native reduce-scatter cannot split by {call.counts}: give equal counts, or "
                    "another collective"
                )
            x = native_input(x, step, call)
            transport.native_reduce_scatter(out, x.contiguous(), group=call.group)
            size = x.numel() * x.element_size()
            call.count(decision, x, size, size * (call.ranks - 1) // call.ranks, clock)
            return out
        rows = math.prod(x.shape[1:-1])  # of codecs, for one step along the first axis
        partial = x.reshape(-1, x.shape[-1])
        sent = exchange_and_sum(
            partial,
            call.tables,
            codec=call.codec,
            group=call.group,
            counts=[count * rows for count in call.counts],
            out=out.view(-1, out.shape[-1]),
            carry=partial_carry(call, step, len(partial)),
        )
        call.count(decision, x, call.payload_bytes(decision.collective, len(partial)), sent, clock)
        return out

    @staticmethod
    def backward(ctx, grad):
        most = max(ctx.counts)
        mine = torch.nn.functional.pad(grad, [0, 0] * (grad.ndim - 1) + [0, most - len(grad)])
        full = grad.new_empty(len(ctx.counts) * most, *grad.shape[1:])
        transport.native_all_gather(full, mine.contiguous(), group=ctx.group)
        if any(count < most for count in ctx.counts):
            blocks = zip(full.split(most), ctx.counts, strict=True)
            full = torch.cat([block[:count] for block, count in blocks])
        return full, None


def exchange_and_sum(
    partial: Tensor,
    tables: Tables,
    *,
    codec: Codec,
    group: dist.ProcessGroup,
    counts: list[int],
    out: Tensor,
    carry: Carry = NO_CARRY,
) -> int:
    """Sum `partial` over the ranks of `group`, each rank its own block of tokens.

    Args:
        partial: Floating point ``[tokens, hidden]``, the same shape on every rank.
        tables: Of this sync point, the same on every rank.
        codec: The same on every rank.
        group: Any backend that exchanges uint8.
        counts: Tokens of each rank's block, in order; the same on every rank.
        out: ``[counts[rank], hidden]`` of any float dtype: the sum of this rank's block.
        carry: Error feedback of this rank's partial, ``[tokens, hidden]``.

    Returns:
        The bytes that this rank sent.
    """
    spans = chunks(max(counts), partial.shape[1], 1)
    starts = [0, *itertools.accumulate(counts)]

    def pieces(a: int, b: int) -> list[tuple[Tensor, Carry]]:
        """Tokens ``[a, b)`` of every rank's block; all of them where the chunk is the message."""
        if len(spans) == 1:
            return [(partial, carry)]
        cuts = [(s + min(a, n), s + min(b, n)) for s, n in zip(starts, counts, strict=False)]
        return [(partial[first:last], carry.rows(first, last)) for first, last in cuts]

    return transport.run(
        _reduce_steps(
            pieces(a, b),
            [max(min(count, b) - a, 0) for count in counts],
            tables,
            codec,
            Channel(group, i % _SLOTS),
            out[a:b],
        )
        for i, (a, b) in enumerate(spans)
    )


def _reduce_steps(
    pieces: list[tuple[Tensor, Carry]],
    counts: list[int],
    tables: Tables,
    codec: Codec,
    channel: Channel,
    out: Tensor,
) -> Steps:
    exchange = channel.exchange_blocks(counts, codec.row_bytes(tables), out.device)
    yield None
    payloads = [codec.encode_with_carry(x, tables, c, rank=channel.rank) for x, c in pieces]
    yield exchange.send(payloads[0] if len(payloads) == 1 else torch.cat(payloads))
    codec.decode_sum(exchange.received, tables, out=out)
