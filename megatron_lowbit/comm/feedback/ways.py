"""What the collectives do with a step of error feedback: carries for each way a message may go."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs.carry import NO_CARRY, Carry
from megatron_lowbit.comm.call import Call
from megatron_lowbit.comm.feedback.chain import Step
from megatron_lowbit.comm.hierarchical import Carries, shares
from megatron_lowbit.comm.traffic import Decision
from megatron_lowbit.comm.transport import chunks, owned, share

TWO_SHOT = "two-shot"
SKIPPED = Decision("skip", "0 bits")


def partial_carry(call: Call, step: Step | None, tokens: int) -> Carry:
    """Of this rank's partial, where no sum is sent: what it owes of sums goes along."""
    if step is None:
        return NO_CARRY
    rows = {TWO_SHOT: share(tokens, call.ranks)}
    for _, taken in step.sums_taken(rows):
        rank = dist.get_rank(call.group)
        return _with_owned(step.carry, taken, tokens=tokens, ranks=call.ranks, rank=rank)
    return step.carry


def _with_owned(carry: Carry, taken: Tensor, *, tokens: int, ranks: int, rank: int) -> Carry:
    """`carry` with the error of sums that this rank owns in the rows of its partial.

    Args:
        carry: Of this rank's partial, ``[tokens, hidden]``.
        taken: ``[share, hidden]``: of the sums that it owned in two-shot, chunk by chunk.
        tokens: Of the message.
        ranks: Of the group.
        rank: This one.
    """
    hidden = taken.shape[1]
    if carry.taken is None:
        whole = torch.zeros(tokens, hidden, device=taken.device)
    else:
        whole = carry.taken.float()
    for a, b in chunks(tokens, hidden, ranks):
        start, stop = owned(b - a, ranks)[rank]
        whole[a + start : a + stop] += taken[a // ranks : a // ranks + stop - start].float()
    return carry._replace(taken=whole)


def sum_carry(call: Call, step: Step | None, tokens: int) -> Carry:
    """Of the sums that this rank owns in two-shot."""
    if step is None:
        return NO_CARRY
    return step.sums({TWO_SHOT: share(tokens, call.ranks)})[TWO_SHOT]


def node_carries(call: Call, step: Step | None, tokens: int) -> Carries:
    """Of every quantization of the hierarchical all-reduce."""
    if step is None:
        return Carries()
    return Carries(step.carry, **step.sums(shares(tokens, call.policy.nodes)))


def native_input(x: Tensor, step: Step | None, call: Call) -> Tensor:
    """What the backend sums itself: the partial with all that this rank owes, in `x`'s dtype.

    What rounding to that dtype misses is dropped, so nothing is left to carry.
    """
    if step is None:
        return x
    rows = x.reshape(-1, x.shape[-1])
    carry = partial_carry(call, step, len(rows))
    step.give_nothing()
    if carry.taken is None:
        return x
    return carry.added_to(rows).to(x.dtype).view(x.shape)


def skip(call: Call, step: Step, x: Tensor, out: Tensor, *, first: int = 0) -> None:
    """A sync point of 0 bits: the calibrated mean is the sum, all else is carried on.

    Args:
        call: Of a codec of 0 bits.
        step: What it takes and gives.
        x: The partial, ``[..., hidden]``.
        out: Where the sum goes: tokens from `first` on.
        first: Of the tokens of `x`.
    """
    partial, rows = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    rank = dist.get_rank(call.group)
    payload = call.codec.encode_with_carry(partial, call.tables, step.carry, rank=rank)
    call.codec.decode_sum(payload[None, first : first + len(rows)], call.tables, out=rows)
    nodes = call.policy.nodes
    owed = {} if nodes is None else shares(len(partial), nodes)
    step.pass_on({TWO_SHOT: share(len(partial), call.ranks), **owed})
