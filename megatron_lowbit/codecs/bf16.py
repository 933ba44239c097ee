"""``bf16``: every feature in BF16; the baseline through the same plumbing.

The plain torch here is the specification; on GPUs `kernels.triton.grouped` gives the same bits.
"""

from types import ModuleType

import torch
from torch import Tensor

from megatron_lowbit.codecs.base import Codec, rounded_into
from megatron_lowbit.codecs.tables import Tables, sum_in_rank_order
from megatron_lowbit.codecs.wire import bytes_of, to_wire_bf16
from megatron_lowbit.kernels import select


class Bf16(Codec):
    """Two bytes a value. Unlike a backend's BF16 all-reduce it sums in fp32, in rank order."""

    name = "bf16"
    supported_bits = (16,)
    takes_index = False

    def row_bytes(self, tables: Tables) -> int:
        return 2 * tables.hidden

    def encode(self, partial: Tensor, tables: Tables, *, rank: int = 0) -> Tensor:
        module = self.kernels(partial, tables)
        if module is None:
            return bytes_of(to_wire_bf16(partial))
        return module.encode(partial, **self._layout(tables))

    def decode_sum(self, payloads: Tensor, tables: Tables, *, out: Tensor | None = None) -> Tensor:
        module = self.kernels(payloads, tables)
        if module is None:
            values = payloads.contiguous().view(torch.bfloat16)
            return rounded_into(out, sum_in_rank_order(values))
        return module.decode_sum(payloads, out=out, **self._layout(tables))

    def kernels(self, values: Tensor, tables: Tables) -> ModuleType | None:
        return select.kernels_for(select.GROUPED, values)

    def _layout(self, tables: Tables) -> dict:
        """What kernels must know of the rows of a payload."""
        return {
            "hidden": tables.hidden,
            "format": "bf16",
            "group": None,
            "bits": self.bits,
            "body_bytes": 0,
            "row_bytes": self.row_bytes(tables),
        }
