"""One-shot all-reduce: all-gather the payloads, and every rank decodes and sums all of them.

One step and one quantization. Each rank sends (ranks - 1) payloads, so it wins where latency rules
(small messages) and at 2 ranks; at 8 ranks and 4.2 bits it sends as many bytes as a BF16 ring.

Every rank decodes the same payloads, its own included, in the same order: all end bit-identical.
"""

import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import Codec, Tables
from megatron_lowbit.codecs.carry import NO_CARRY, Carry
from megatron_lowbit.comm.transport import Channel, Steps, chunks, run

_SLOTS = 3


def one_shot(
    partial: Tensor,
    tables: Tables,
    *,
    codec: Codec,
    group: dist.ProcessGroup,
    out: Tensor,
    carry: Carry = NO_CARRY,
) -> int:
    """Sum `partial` over the ranks of `group`.

    Args:
        partial: Floating point ``[tokens, hidden]``, the same shape on every rank.
        tables: Of this sync point, the same on every rank.
        codec: The same on every rank.
        group: Any backend that gathers uint8.
        out: ``[tokens, hidden]`` of any float dtype: the sum, bit-identical on all ranks.
        carry: Error feedback of this rank's partial, ``[tokens, hidden]``.

    Returns:
        The bytes that this rank sent.
    """
    # All of a chunk goes to every rank. 4 MB, 2 ranks, 1 Gbit/s: 9.9 ms; in chunks twice as long,
    # 11.2.
    spans = chunks(len(partial), partial.shape[1], 1)
    return run(
        one_shot_steps(
            partial[a:b], tables, codec, Channel(group, i % _SLOTS), out[a:b], carry.rows(a, b)
        )
        for i, (a, b) in enumerate(spans)
    )


def one_shot_steps(
    partial: Tensor,
    tables: Tables,
    codec: Codec,
    channel: Channel,
    out: Tensor,
    carry: Carry = NO_CARRY,
) -> Steps:
    """The steps of one chunk; arguments as those of `one_shot`."""
    gather = channel.gather(len(partial), codec.row_bytes(tables), partial.device)
    yield None
    yield gather.send(codec.encode_with_carry(partial, tables, carry, rank=channel.rank))
    codec.decode_sum(gather.received, tables, out=out)
