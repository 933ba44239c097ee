"""What a collective gives and sends, without communication: all ranks' partials in one process.

Every partial is encoded as its rank would, and the payloads are decoded and summed as every rank
would: the same bits as the collective itself, since payload rows are self-contained and sums are in
rank order, and the same traffic as its first rank counts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lowbit.codecs import Codec, Tables
from megatron_lowbit.codecs.carry import NO_CARRY
from megatron_lowbit.comm.feedback.chain import Step
from megatron_lowbit.comm.feedback.ways import SKIPPED, TWO_SHOT
from megatron_lowbit.comm.traffic import Clock, Counters, Decision, Traffic
from megatron_lowbit.comm.transport import chunks, owned, share
from megatron_lowbit.errors import LowbitError


def simulated_all_reduce(
    partials: Tensor,
    tables: Tables,
    *,
    codec: Codec,
    collective: str,
    traffic: Traffic,
    steps: Sequence[Step] = (),
) -> Tensor:
    """The sum of all ranks' partials.

    Args:
        partials: bf16, fp16 or fp32 ``[ranks, ..., hidden]``.
        tables: Of this sync point.
        codec: Encodes and decodes.
        collective: ``one-shot`` or ``two-shot``.
        traffic: Counters to add the call to, as the first rank would.
        steps: Error feedback: what each rank's partial takes and gives. The first one's has the
            sums of all owners, too.

    Returns:
        ``[..., hidden]`` of `partials`' dtype: the bits that the collective gives on every rank.

    Raises:
        LowbitError: A codec of 0 bits without feedback.
    """
    if codec.bits == 0 and not steps:
        raise LowbitError(f"{codec} sends nothing: it needs error feedback")
    clock = Clock(partials.device)
    ranks, rows = len(partials), partials.flatten(1, -2)
    tokens, width = rows.shape[1:]
    carries = [step.carry for step in steps] or [NO_CARRY] * ranks
    payloads = torch.stack(
        [
            codec.encode_with_carry(row, tables, carry, rank=r)
            for r, (row, carry) in enumerate(zip(rows, carries, strict=True))
        ]
    )
    payload = tokens * codec.row_bytes(tables)
    out = rows.new_empty(tokens, tables.hidden)
    if codec.bits == 0:
        codec.decode_sum(payloads[:1], tables, out=out)
        steps[0].pass_on({TWO_SHOT: tokens})
        traffic.add(SKIPPED, Counters(1, tokens, out.numel()), clock.stop())
        return out.view(*partials.shape[1:-1], tables.hidden)
    if collective == "one-shot":
        codec.decode_sum(payloads, tables, out=out)
        sent = (ranks - 1) * payload
    else:
        sum_codec, sum_tables = codec.for_sum(), codec.sum_tables(tables)
        carry = steps[0].sums({TWO_SHOT: tokens})[TWO_SHOT] if steps else NO_CARRY
        of_sum = codec.reduce_encode_with_carry(payloads, tables, carry)
        sum_codec.decode_sum(of_sum[None], sum_tables, out=out)
        sum_row = sum_codec.row_bytes(sum_tables)
        sent = _sent_in_two_shot(tokens, width, ranks, codec.row_bytes(tables), sum_row)
        payload = (payload + tokens * sum_row) // 2
    counters = Counters(1, tokens, out.numel(), payload, sent)
    traffic.add(Decision(collective, "fixed"), counters, clock.stop())
    return out.view(*partials.shape[1:-1], tables.hidden)


def _sent_in_two_shot(tokens: int, hidden: int, ranks: int, row: int, sum_row: int) -> int:
    """Bytes that the first rank sends: the tokens of others, then its sums to the others."""
    sent = 0
    for start, stop in chunks(tokens, hidden, ranks):
        own = owned(stop - start, ranks)[0][1]
        sent += (stop - start - own) * row + (ranks - 1) * share(stop - start, ranks) * sum_row
    return sent
