"""What a collective gives and sends, without communication: all ranks' partials in one process.

Every partial is encoded as its rank would, and the payloads are decoded and summed as every rank
would: the same bits as the collective itself, since payload rows are self-contained and sums are in
rank order, and the same traffic as its first rank counts.
"""

import torch
from torch import Tensor

from megatron_lowbit.codecs import Codec, Tables
from megatron_lowbit.comm.traffic import Clock, Counters, Decision, Traffic
from megatron_lowbit.comm.transport import chunks, owned, share


def simulated_all_reduce(
    partials: Tensor, tables: Tables, *, codec: Codec, collective: str, traffic: Traffic
) -> Tensor:
    """The sum of all ranks' partials.

    Args:
        partials: bf16, fp16 or fp32 ``[ranks, ..., hidden]``.
        tables: Of this sync point.
        codec: Encodes and decodes.
        collective: ``one-shot`` or ``two-shot``.
        traffic: Counters to add the call to, as the first rank would.

    Returns:
        ``[..., hidden]`` of `partials`' dtype: the bits that the collective gives on every rank.
    """
    clock = Clock(partials.device)
    ranks, rows = len(partials), partials.flatten(1, -2)
    tokens, width = rows.shape[1:]
    payloads = torch.stack([codec.encode(row, tables, rank=r) for r, row in enumerate(rows)])
    payload = tokens * codec.row_bytes(tables)
    out = rows.new_empty(tokens, tables.hidden)
    if collective == "one-shot":
        codec.decode_sum(payloads, tables, out=out)
        sent = (ranks - 1) * payload
    else:
        sum_codec, sum_tables = codec.for_sum(), codec.sum_tables(tables)
        of_sum = codec.reduce_encode(payloads, tables)
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
