"""How the partials of a model's sync points are summed: one interface for two ways.

`OverRanks`: a model under tensor parallelism, each rank with its own partial. `Simulated`
(`integration.simulate`): a whole model in one process, which makes the partials of N ranks itself.
Calibration and evaluation are written over what both can do. A *reducer* is called with what a
sync point has here (`OverRanks`: this rank's partial, ``[..., hidden]``; `Simulated`: all partials,
``[ranks, ..., hidden]``) and gives the sum.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import Codec, Tables
from megatron_lowbit.codecs.base import sum_in_rank_order
from megatron_lowbit.comm.traffic import Traffic
from megatron_lowbit.integration.compat import OBSERVATION, require
from megatron_lowbit.integration.handle import Reducer
from megatron_lowbit.integration.sync_points import Attachment, SyncPoint

# (number of the sync point, what it has here, its native sum)
Watch = Callable[[int, Tensor, Tensor], None]


class CountingReducer(Protocol):
    """A reducer through a codec, with the counters of its sync point."""

    traffic: Traffic

    def __call__(self, partial: Tensor, scatter: bool) -> Tensor:
        """The sum, or with `scatter` this rank's part of it."""


class Summing(Protocol):
    """What both ways can do.

    Attributes:
        points: The model's sync points.
        ranks: How many partials a sum has.
        here: How many of them this process has.
        is_simulated: Whether no bytes travel.
    """

    points: list[SyncPoint]
    ranks: int
    here: int
    is_simulated: bool

    def reducer(
        self, point: SyncPoint, codec: Codec, tables: Tables, collective: str
    ) -> CountingReducer:
        """A reducer of `point` through `codec`, by ``one-shot`` or ``two-shot``."""

    def using(self, reducers: list) -> AbstractContextManager[None]:
        """A context in which each sync point sums by its reducer, and not natively."""

    def watching(self, watch: Watch) -> AbstractContextManager[None]:
        """A context in which each sync point sums natively and calls `watch`."""

    def partials(self, partial: Tensor) -> list[Tensor]:
        """The partials in what a sync point has here: `here` tensors ``[..., hidden]``."""

    def exact(self, point: SyncPoint, partial: Tensor) -> Tensor:
        """The fp32 sum in rank order, of what a sync point has here."""


class OverRanks:
    """Sync points whose partials are on the ranks of their tensor-parallel group."""

    here = 1
    is_simulated = False

    def __init__(self, points: list[SyncPoint]):
        require(OBSERVATION)
        self.points = points
        self.ranks = dist.get_world_size(points[0].group)

    def reducer(
        self, point: SyncPoint, codec: Codec, tables: Tables, collective: str
    ) -> CountingReducer:
        return Reducer(codec, tables, point.group, collective)

    @contextmanager
    def using(self, reducers: list) -> Iterator[None]:
        attachment = Attachment(self.points, reducers)
        try:
            yield
        finally:
            attachment.remove()

    def watching(self, watch: Watch) -> AbstractContextManager[None]:
        return self.using([_watched(n, point, watch) for n, point in enumerate(self.points)])

    def partials(self, partial: Tensor) -> list[Tensor]:
        return [partial]

    def exact(self, point: SyncPoint, partial: Tensor) -> Tensor:
        parts = [torch.empty_like(partial, dtype=torch.float32) for _ in range(self.ranks)]
        dist.all_gather(parts, partial.float().contiguous(), group=point.group)
        return sum_in_rank_order(torch.stack(parts))


def _watched(number: int, point: SyncPoint, watch: Watch):
    from megatron.core.tensor_parallel import mappings

    def reduce(partial: Tensor, scatter: bool) -> Tensor:
        # Megatron sums in place.
        total = mappings.reduce_from_tensor_model_parallel_region(
            partial.clone(), group=point.group
        )
        watch(number, partial, total)
        if not scatter:
            return total
        # The whole sum was needed for the watcher; the model gets its own tokens, and in a
        # backward pass the gradients of all of them come back.
        return mappings.scatter_to_sequence_parallel_region(total, group=point.group)

    return reduce
