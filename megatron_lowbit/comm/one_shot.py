"""One-shot all-reduce: all-gather the payloads, and every rank decodes and sums all of them.

One step and one quantization. Each rank sends (ranks - 1) payloads, so it wins where latency rules
(small messages) and at 2 ranks; at 8 ranks and 4.2 bits it sends as many bytes as a BF16 ring.

Every rank decodes the same payloads, its own included, in the same order: all end bit-identical.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import Codec, Tables

# torch 2.13 renames all_gather_into_tensor and warns where the old name is used.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def one_shot(
    partial: Tensor, tables: Tables, *, codec: Codec, group: dist.ProcessGroup
) -> tuple[Tensor, int, int]:
    """Sum `partial` over the ranks of `group`.

    Args:
        partial: Floating point ``[tokens, hidden]``, the same shape on every rank.
        tables: Of this sync point, the same on every rank.
        codec: The same on every rank.
        group: Any backend that gathers uint8.

    Returns:
        The sum, fp32 ``[tokens, hidden]``, bit-identical on all ranks; the bytes of this rank's
        payload; the bytes that this rank sent.
    """
    ranks = dist.get_world_size(group)
    payload = codec.encode(partial, tables, rank=dist.get_rank(group))
    payloads = torch.empty((ranks, *payload.shape), dtype=torch.uint8, device=payload.device)
    if payload.numel():
        _all_gather(payloads.flatten(0, 1), payload, group=group)
    sent = (ranks - 1) * payload.numel()
    return codec.decode_sum(payloads, tables), payload.numel(), sent
