"""The pipeline stages of a model, as loops over it see them.

Each stage has some of the layers. All stages run the same loop and see the same logits. What only
one of them has, such as the statistics of its sync points, they tell each other here.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_lowbit.comm.agreement import gather_values


@dataclass(frozen=True)
class Stages:
    """The stages that run a sequence one after the other.

    Attributes:
        group: This rank and those of the other stages that hold the same part of the tensors, in
            the order of the stages; None where the model has one stage.
    """

    group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def number(self) -> int:
        """Of this rank's stage, from 0."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def gather(self, value: Any) -> list:
        """Every stage's `value`, in order; call it on every rank."""
        return [value] if self.group is None else gather_values(value, group=self.group)

    def shared(self, value: Any, *, source: int) -> Any:
        """The `value` of stage number `source`, on every stage; call it on every rank."""
        return self.gather(value if self.number == source else None)[source]


WHOLE = Stages()
