"""``bf16``: every feature in BF16; the baseline through the same plumbing."""

import torch
from torch import Tensor

from megatron_lowbit.codecs.base import Codec, Tables, rounded_into, sum_in_rank_order
from megatron_lowbit.codecs.wire import bf16_bytes, to_wire_bf16


class Bf16(Codec):
    """Two bytes a value. Unlike a backend's BF16 all-reduce it sums in fp32, in rank order."""

    name = "bf16"
    supported_bits = (16,)
    takes_index = False

    def row_bytes(self, tables: Tables) -> int:
        return 2 * tables.hidden

    def encode(self, partial: Tensor, tables: Tables, *, rank: int = 0) -> Tensor:
        return bf16_bytes(to_wire_bf16(partial))

    def decode_sum(self, payloads: Tensor, tables: Tables, *, out: Tensor | None = None) -> Tensor:
        return rounded_into(out, sum_in_rank_order(payloads.view(torch.bfloat16)))
