"""Which of a model's layers a rank has, for what is said under pipeline parallelism."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from megatron_lowbit.comm.agreement import gather_values
from megatron_lowbit.integration.sync_points import transformer_layers


@dataclass(frozen=True)
class Stage:
    """The layers of this rank among those of all ranks.

    Attributes:
        layers: Their numbers.
        is_whole: Whether no rank has others.
    """

    layers: tuple[int, ...]
    is_whole: bool

    def where(self) -> str:
        """To follow what is counted: which layers these are; nothing if they are all."""
        if self.is_whole:
            return ""
        return f" of layers {', '.join(map(str, self.layers))}" if self.layers else " of this stage"


def stage_of(model: nn.Module | Iterable[nn.Module]) -> Stage:
    """The stage of this rank; call it on every rank."""
    layers = tuple(sorted(transformer_layers(model)))
    return Stage(layers, all(other == layers for other in gather_values(layers)))
