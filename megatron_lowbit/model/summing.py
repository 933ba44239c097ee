"""How the partials of a model's sync points are summed, as loops over a model see it.

A *reducer* sums what a sync point has here: this rank's partial, ``[..., hidden]``, of a model
under tensor parallelism, or all partials, ``[ranks, ..., hidden]``, of a model that is whole in one
process (`integration.sums.simulate`). `Summing` is the interface of both. Calibration and
evaluation are written over it, and so know nothing of Megatron.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import Codec, Tables
from megatron_lowbit.comm.traffic import Traffic
from megatron_lowbit.model.stages import Stages

# (number of the sync point, what it has here, its native sum)
Watch = Callable[[int, Tensor, Tensor], None]


class Reducer(Protocol):
    """Sums what a sync point has here."""

    def __call__(self, partial: Tensor, scatter: bool, /) -> Tensor:
        """The sum, or with `scatter` this rank's part of it."""


class CountingReducer(Reducer, Protocol):
    """A reducer through a codec, with the counters of its sync point."""

    traffic: Traffic


@dataclass(frozen=True)
class Placed:
    """Where a sync point is, on whatever stage.

    Attributes:
        layer: Megatron's layer number: from 1, over all pipeline stages.
        name: Its path under the layer, such as ``mlp.linear_fc2``.
        chunk: Number of the model chunk that it is in.
        apart: Why it is outside the chain that carries errors (`comm.feedback`); empty if it is in.
    """

    layer: int
    name: str
    chunk: int = 0
    apart: str = ""

    def __str__(self) -> str:
        return f"layer {self.layer} {self.name}"


def chains(points: Sequence[Placed]) -> list[list[int]]:
    """The chains that carry errors: numbers of sync points in call order, a list a model chunk.

    A sync point that is apart, or alone in its chunk, is in none.
    """
    by_chunk: dict[int, list[int]] = {}
    for number, point in enumerate(points):
        if not point.apart:
            by_chunk.setdefault(point.chunk, []).append(number)
    return [chain for chain in by_chunk.values() if len(chain) > 1]


class Point(Placed, ABC):
    """A sync point of this stage, by what loops need of it."""

    @property
    @abstractmethod
    def hidden(self) -> int:
        """Features of its sum."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its partials are."""

    @property
    @abstractmethod
    def group(self) -> dist.ProcessGroup:
        """The tensor-parallel group that it sums over."""


class Folded(Protocol):
    """Folded weights of all sync points; entering it puts them in, leaving it takes them out.

    Attributes:
        tables: Of each sync point, for the partials that its folded weight makes.
    """

    tables: list[Tables]

    def __enter__(self) -> "Folded": ...

    def __exit__(self, *exc_info) -> None: ...


class Summing(Protocol):
    """What both ways can do.

    Attributes:
        points: The sync points of this stage.
        stages: The pipeline stages of the model.
        everywhere: Where the sync points of all stages are, in order.
        first: The number among them of this stage's first one.
        ranks: How many partials a sum has.
        here: How many of them this process has.
        is_simulated: Whether no bytes travel.
    """

    stages: Stages
    everywhere: Sequence[Placed]
    first: int
    ranks: int
    here: int
    is_simulated: bool

    @property
    def points(self) -> Sequence[Point]: ...

    def reducers(
        self,
        codecs: Sequence[Codec],
        tables: Sequence[Tables],
        collective: str,
        *,
        feedback: bool = False,
    ) -> list[CountingReducer]:
        """A reducer for each sync point, through its codec and tables.

        Args:
            codecs: Of each sync point.
            tables: Of each sync point.
            collective: ``one-shot`` or ``two-shot``.
            feedback: Whether errors are carried from each sync point to the next one in its chain.
        """

    def using(self, reducers: Sequence[Reducer]) -> AbstractContextManager:
        """A context in which each sync point sums by its reducer, and not natively."""

    def watching(self, watch: Watch) -> AbstractContextManager:
        """A context in which each sync point sums natively and calls `watch`."""

    def folded(self, tables: Sequence[Tables]) -> Folded:
        """Weights with the rotations of `tables` folded in.

        Raises:
            LowbitError: The weight of a sync point cannot be folded.
        """

    def partials(self, partial: Tensor) -> list[Tensor]:
        """The partials in what a sync point has here: `here` tensors ``[..., hidden]``."""

    def exact(self, point: Point, partial: Tensor) -> Tensor:
        """The fp32 sum in rank order, of what a sync point has here."""
