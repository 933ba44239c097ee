"""The reducer of one sync point in low bits (`model.summing.Reducer`), over real ranks."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import Codec, Tables
from megatron_lowbit.comm import all_reduce, reduce_scatter
from megatron_lowbit.comm.policy.policy import Policy
from megatron_lowbit.comm.traffic import Traffic
from megatron_lowbit.integration.sums.chains import Link


class CodecReducer:
    """Sums one sync point's partial through a codec and counts what it sends."""

    def __init__(
        self,
        codec: Codec,
        tables: Tables,
        group: dist.ProcessGroup,
        policy: str | Policy,
        link: Link | None = None,
    ):
        self.codec, self.tables, self.group, self.link = codec, tables, group, link
        self.policy = Policy(policy) if isinstance(policy, str) else policy
        self.traffic = Traffic()

    def __call__(self, partial: Tensor, scatter: bool) -> Tensor:
        if self.tables.bf16_index.device != partial.device:  # the model moved since `apply`
            self.tables = self.tables.to(partial.device)
        call: dict[str, Any] = {
            "group": self.group,
            "codec": self.codec,
            "tables": self.tables,
            "collective": self.policy,
            "traffic": self.traffic,
            "feedback": self.link.serving(partial) if self.link else None,
        }
        if scatter:
            return reduce_scatter(partial, **call)
        return all_reduce(partial, in_place=True, **call)
