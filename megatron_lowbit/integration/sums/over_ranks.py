"""The sums of a model under tensor parallelism, each rank with its own partial.

`OverRanks` is `model.summing.Summing` over real ranks; `integration.sums.simulate` has the other
way.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import Codec, Tables
from megatron_lowbit.codecs.tables import sum_in_rank_order
from megatron_lowbit.integration.compat import OBSERVATION, require
from megatron_lowbit.integration.sums.chains import links
from megatron_lowbit.integration.sums.folded_weights import Folding, fold_all
from megatron_lowbit.integration.sums.reducer import CodecReducer
from megatron_lowbit.integration.sums.sync_points import SyncPoint, attach
from megatron_lowbit.model.stages import WHOLE, Stages
from megatron_lowbit.model.summing import CountingReducer, Placed, Point, Reducer, Watch


class OverRanks:
    """Sync points whose partials are on the ranks of their tensor-parallel group."""

    here = 1
    first = 0
    is_simulated = False

    def __init__(self, points: list[SyncPoint]):
        require(OBSERVATION)
        self.points = points
        self.stages: Stages = WHOLE
        self.everywhere: Sequence[Placed] = points
        self.ranks = dist.get_world_size(points[0].group)

    def reducers(
        self,
        codecs: Sequence[Codec],
        tables: Sequence[Tables],
        collective: str,
        *,
        feedback: bool = False,
    ) -> list[CountingReducer]:
        carrying = links(self.points, codecs) if feedback else [None] * len(self.points)
        each = zip(self.points, codecs, tables, carrying, strict=True)
        return [
            CodecReducer(codec, table, point.group, collective, link)
            for point, codec, table, link in each
        ]

    def using(self, reducers: Sequence[Reducer]) -> AbstractContextManager:
        return attach(self.points, reducers)

    def watching(self, watch: Watch) -> AbstractContextManager:
        return self.using([_watched(n, point, watch) for n, point in enumerate(self.points)])

    def folded(self, tables: Sequence[Tables]) -> Folding:
        return fold_all(self.points, tables)

    def partials(self, partial: Tensor) -> list[Tensor]:
        return [partial]

    def exact(self, point: Point, partial: Tensor) -> Tensor:
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
