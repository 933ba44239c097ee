"""Simulated tensor parallelism: the sums of N ranks in one process, without communication.

The model is loaded whole. At each sync point the contraction is split N ways: partial r is
``x[..., slice r] @ W[:, slice r]^T`` in the model's dtype, as rank r would have it. Every partial
is really encoded and the payloads are really decoded and summed (`comm.simulated`), so a codec does
to a model what it does at tensor parallel size N.

**Contract**: wherever the model runs at tensor parallel size N too, its logits with a codec are the
same bit for bit (a test, at 3). All else that tensor parallelism splits (column-parallel linears,
attention heads, the vocabulary) is left whole, since that changes no sum, and no bit either where a
BF16 matrix product's bits do not depend on how many columns it has. oneDNN's do not on a CPU with
AVX512-BF16 (measured for 1 to 512 tokens, contractions of 64 to 1536 in 3 and 8 parts, 1 and 2
threads). N need not divide heads: any N does that divides the contractions.

The native sum is that of the BF16 partials in fp32, in rank order, rounded to the model's dtype:
what codec ``bf16`` gives. A backend's own all-reduce rounds after each addition instead, so native
results differ from real ones by that rounding. What is no sync point (routed experts) is not split.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.codecs import Codec, Tables
from megatron_lowbit.codecs.tables import sum_in_rank_order
from megatron_lowbit.comm.simulated import simulated_all_reduce
from megatron_lowbit.comm.traffic import Traffic
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.sums.chain_check import agree
from megatron_lowbit.integration.sums.chains import Link, links
from megatron_lowbit.integration.sums.folded_weights import Folding, fold_all
from megatron_lowbit.integration.sums.over_ranks import OverRanks
from megatron_lowbit.integration.sums.routes import is_plain
from megatron_lowbit.integration.sums.sync_points import SyncPoint, find_sync_points
from megatron_lowbit.model.stages import WHOLE, Stages
from megatron_lowbit.model.summing import CountingReducer, Placed, Point, Reducer, Summing, Watch


def find_summing(
    model: nn.Module, simulate_tp: int | None, index: CalibrationIndex | None = None
) -> tuple[Summing, dict[str, str]]:
    """How `model` sums, simulated if `simulate_tp` is given, and what is no sync point and why.

    With `index` its chain is what calibration found (`chain_check`).

    Raises:
        LowbitError: See `find_sync_points`, `agree` and `Simulated`.
    """
    points, native = find_sync_points(model)
    if index is not None:
        points = agree(points, index.manifest, index.origin)
    return (Simulated(points, simulate_tp) if simulate_tp else OverRanks(points)), native


class Simulated:
    """Sync points whose partials are all made here; from now on the model sums these.

    Raises:
        LowbitError: A layer is not of the local spec, or `ranks` does not divide a contraction.
    """

    first = 0
    is_simulated = True

    def __init__(self, points: list[SyncPoint], ranks: int):
        self.points = points
        self.stages: Stages = WHOLE
        self.everywhere: Sequence[Placed] = points
        self.ranks = self.here = ranks
        for point in points:
            if not is_plain(point.module):
                raise LowbitError(
                    f"--simulate-tp needs the local spec (--transformer-impl local): {point} is a "
                    f"{type(point.module).__name__}"
                )
            if point.module.input_size % ranks:
                raise LowbitError(
                    f"--simulate-tp {ranks} does not divide the {point.module.input_size} inputs "
                    f"of {point}: choose a divisor"
                )
        self._forwards = [_Forward(point.module, ranks) for point in points]

    def reducers(
        self,
        codecs: Sequence[Codec],
        tables: Sequence[Tables],
        collective: str,
        *,
        feedback: bool = False,
    ) -> list[CountingReducer]:
        if collective == "two-shot":
            for codec, table in zip(codecs, tables, strict=True):
                codec.sum_tables(table)  # raises where there is none, before anything runs
        of_ranks = [links(self.points, codecs) for _ in range(self.ranks)] if feedback else []
        return [
            SimulatedReducer(codec, table, collective, [rank[n] for rank in of_ranks])
            for n, (codec, table) in enumerate(zip(codecs, tables, strict=True))
        ]

    @contextmanager
    def using(self, reducers: Sequence[Reducer]) -> Iterator[None]:
        for forward, reducer in zip(self._forwards, reducers, strict=True):
            forward.reducer = reducer
        try:
            yield
        finally:
            for forward in self._forwards:
                forward.reducer = _native

    def watching(self, watch: Watch) -> AbstractContextManager:
        return self.using([_watched(n, watch) for n in range(len(self.points))])

    def folded(self, tables: Sequence[Tables]) -> Folding:
        return fold_all(self.points, tables)

    def partials(self, partial: Tensor) -> list[Tensor]:
        return list(partial)

    def exact(self, point: Point, partial: Tensor) -> Tensor:
        return sum_in_rank_order(partial)


class _Forward:
    """In the place of a RowParallelLinear's `forward`."""

    def __init__(self, module: nn.Module, ranks: int):
        self._module, self._ranks = module, ranks
        self.reducer: Reducer = _native
        module.forward = self  # an attribute of the instance, before the class's method

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sum of the partials, and the bias, which whoever called adds."""
        slices = zip(
            x.chunk(self._ranks, -1), self._module.weight.chunk(self._ranks, 1), strict=True
        )
        partials = torch.stack([torch.matmul(part, weight.t()) for part, weight in slices])
        return self.reducer(partials, False), self._module.bias


class SimulatedReducer:
    """Sums one sync point's partials through a codec and counts what ranks would send."""

    def __init__(
        self, codec: Codec, tables: Tables, collective: str, of_ranks: Sequence[Link | None]
    ):
        self.codec, self.tables, self.collective = codec, tables, collective
        self.links = [link for link in of_ranks if link is not None]  # each rank's, or none
        self.traffic = Traffic()

    def __call__(self, partials: Tensor, scatter: bool) -> Tensor:
        each = zip(self.links, partials, strict=bool(self.links))
        return simulated_all_reduce(
            partials,
            self.tables,
            codec=self.codec,
            collective=self.collective,
            traffic=self.traffic,
            steps=[link.step(x, self.tables.hidden) for link, x in each],
        )


def _native(partials: Tensor, scatter: bool) -> Tensor:
    return sum_in_rank_order(partials).to(partials.dtype)


def _watched(number: int, watch: Watch):
    def reduce(partials: Tensor, scatter: bool) -> Tensor:
        total = _native(partials, scatter)
        watch(number, partials, total)
        return total

    return reduce
