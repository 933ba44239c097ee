"""The all-reduce in low bits: the sum of all ranks' partials, on every rank.

The gradient of the sum is every rank's gradient: the identity, as in Megatron. What holds for every
collective is in `comm.call`.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import DEFAULT_CODEC, Codec, Tables
from megatron_lowbit.codecs.carry import NO_CARRY
from megatron_lowbit.comm.call import Call, public, records, run
from megatron_lowbit.comm.feedback.chain import Feedback, Step
from megatron_lowbit.comm.feedback.ways import (
    SKIPPED,
    native_input,
    node_carries,
    partial_carry,
    skip,
    sum_carry,
)
from megatron_lowbit.comm.hierarchical import hierarchical
from megatron_lowbit.comm.one_shot import one_shot
from megatron_lowbit.comm.policy.policy import Policy
from megatron_lowbit.comm.traffic import Clock, Counters, Decision, Traffic
from megatron_lowbit.comm.two_shot import two_shot


@public
def all_reduce(
    x: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    codec: str | Codec = DEFAULT_CODEC,
    tables: Tables | None = None,
    collective: str | Policy = "one-shot",
    traffic: Traffic | None = None,
    in_place: bool = False,
    feedback: Feedback | None = None,
) -> Tensor:
    """Sum `x` over the ranks of `group` with low-bit payloads on the wire.

    Args:
        x: bf16, fp16 or fp32 ``[..., hidden]``, of the same shape on every rank.
        group: The process group; the default group if left out. With one rank nothing is sent and
            `x` itself is returned, as Megatron does.
        codec: A codec, or its name (`megatron_lowbit.get_codec` for other bits).
        tables: What calibration knows of this tensor (`codec.tables`). Left out: no feature
            travels in BF16, which codecs with calibrated ranges refuse.
        collective: ``native``, ``one-shot`` or ``two-shot``; a `Policy` made once
            (`comm.policy.making.make_policy`) for ``hierarchical`` and ``auto``.
        traffic: Counters to add this call to.
        in_place: Put the sum into `x`, as Megatron's own does (64 MB over 1 Gbit/s, 4 ranks: the
            page faults of a new tensor cost 4 % of the time). An `x` that is strided, or whose
            gradient autograd records, is left alone all the same.
        feedback: An `ErrorFeedback` that all calls of a stream share: what the call before could
            not send goes along. The same on every rank; for inference only.

    Returns:
        The sum, of `x`'s shape and dtype, bit-identical on all ranks.

    Raises:
        LowbitError: Unsupported dtype, no feature dimension, unknown codec or collective, tables
            of another codec, hidden size or number of ranks, or a codec of 0 bits without feedback.
    """
    if in_place and isinstance(collective, Policy) and not records(x):
        decision = collective.all_reduce(x.numel())
        is_native = decision.collective == "native" and x.is_contiguous()
        if is_native and _owes_nothing(feedback, codec):
            return _native(x, group, decision, traffic)
    call = Call(x, group, codec, tables, collective, traffic, feedback)
    whole = call.tables.folded_index is None and x.is_contiguous()
    call.in_place = in_place and whole and not records(x)
    return x if call.ranks == 1 else run(_AllReduce, x, call)


class _AllReduce(torch.autograd.Function):
    """The sum over ranks; every rank's gradient is the gradient of the sum."""

    @staticmethod
    def forward(ctx, x, call):
        decision, step = call.policy.all_reduce(x.numel()), call.step(x)
        if decision.collective == "native" and call.codec.bits:
            total = native_input(x, step, call)
            if total is x and not call.in_place:
                total = x.clone(memory_format=torch.contiguous_format)
            return _native(total, call.group, decision, call.traffic)
        clock, partial = Clock(x.device), x.reshape(-1, x.shape[-1])
        # In place too: a chunk's sum is written after its partial was encoded.
        out = x if call.in_place else call.output(x)
        if call.codec.bits == 0:
            skip(call, step, x, out)
            call.count(SKIPPED, x, 0, 0, clock)
            return out
        rows = out.view(len(partial), call.tables.hidden)
        decision, sent = _send(decision, partial, call, step, rows)
        payload = call.payload_bytes(decision.collective, len(partial))
        call.count(decision, x, payload, sent, clock)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _owes_nothing(feedback: Feedback | None, codec: str | Codec) -> bool:
    """Whether a native call may go straight to the backend; if so, `feedback` has noted it.

    With feedback that is a pass that goes native as a whole, as `auto` has it. Wrong arguments go
    the long way, which names them.
    """
    if feedback is None:
        return True
    by_native = getattr(feedback, "by_native", None)
    return by_native is not None and bool(getattr(codec, "bits", True)) and by_native()


def _native(x: Tensor, group, decision: Decision, traffic: Traffic | None) -> Tensor:
    """The backend's own sum, in place, with as little as possible around it.

    That little is cold when a rank has waited for its turn: 8 KB, 2 ranks, 2 cores take 0.38 ms, of
    which 3 us of Python, measured in a loop, were 20.
    """
    group = group or dist.group.WORLD
    ranks = group.size()
    if ranks == 1:
        return x
    if traffic is None:
        dist.all_reduce(x, group=group)
        return x
    clock = Clock(x.device)
    dist.all_reduce(x, group=group)
    clock.stop()
    size, tokens = x.numel() * x.element_size(), x.numel() // x.shape[-1]
    sent = 2 * size * (ranks - 1) // ranks
    traffic.add(decision, Counters(1, tokens, x.numel(), size, sent), clock)
    return x


def _send(
    decision: Decision, partial: Tensor, call: Call, step: Step | None, out: Tensor
) -> tuple[Decision, int]:
    """Sum `partial` into `out` in low bits: what was chosen in the end, and the bytes sent."""
    codec, tables, policy, tokens = call.codec, call.tables, call.policy, len(partial)
    if decision.collective == "hierarchical":
        carries = node_carries(call, step, tokens)
        nodes = policy.nodes
        sent = hierarchical(partial, tables, codec=codec, nodes=nodes, out=out, carries=carries)
        return decision, sent
    is_two_shot, of_sum = decision.collective == "two-shot", NO_CARRY
    if is_two_shot:
        carry, of_sum = step.carry if step else NO_CARRY, sum_carry(call, step, tokens)
    else:
        carry = partial_carry(call, step, tokens)
    memory = policy.symmetric_memory
    if memory.takes(decision.collective, partial, codec, tables, call.group):
        sent = memory.all_reduce(
            decision.collective, partial, codec, tables, out, carry=carry, of_sum=of_sum
        )
        return replace(decision, why=f"{decision.why}, over symmetric memory"), sent
    send = {"codec": codec, "group": call.group, "out": out}
    if is_two_shot:
        return decision, two_shot(partial, tables, carry=carry, of_sum=of_sum, **send)
    return decision, one_shot(partial, tables, carry=carry, **send)
