"""Which of a model's layers a rank has, for what is said under pipeline parallelism."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from megatron_lowbit.comm.agreement import gather_values
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.sums.sync_points import SyncPoint, transformer_layers


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


def require_same_points(
    model: nn.Module | Iterable[nn.Module], points: Iterable[SyncPoint]
) -> None:
    """Raise on every rank if ranks with the same layers have found other sync points in them.

    One that has none would not take part in what the others of its group agree on.
    """
    found = gather_values((sorted(transformer_layers(model)), [str(point) for point in points]))
    for rank, (layers, names) in enumerate(found):
        other = next(other for other, (same, _) in enumerate(found) if same == layers)
        if names != found[other][1]:
            raise LowbitError(
                f"ranks differ in the sync points that could use low bits: rank {other} has "
                f"{len(found[other][1])}, rank {rank} has {len(names)} of the same layers"
            )
