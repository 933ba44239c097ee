"""Switch a model's sync points to the low-bit path, and back.

    handle = megatron_lowbit.apply(model, "CKPT/lowbit")
    print(handle)            # one line: how many sync points, which codec, what stays native
    handle.status()          # each sync point, with its codec and traffic
    handle.stats()           # calls, bytes, time and choices, as JSON can hold them
    handle.remove()          # Megatron's own reduction again

Call it after the checkpoint is loaded and before the first forward pass: the index is checked
against the model's weights. The model's parameters, buffers and state_dict are not touched.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from megatron_lowbit.calibration.index import Index
from megatron_lowbit.codecs import CALIBRATED_CODEC, Codec, Tables
from megatron_lowbit.comm import all_reduce, reduce_scatter
from megatron_lowbit.comm.agreement import on_every_rank, require_equal
from megatron_lowbit.comm.choice import DEFAULT_MODE, Chooser, Settings, make_chooser
from megatron_lowbit.comm.traffic import Counters, Traffic
from megatron_lowbit.integration.choices import Chosen, choose
from megatron_lowbit.integration.cuda_graphs import check_cuda_graphs, check_no_graphs
from megatron_lowbit.integration.gathers import GatherAttachment, Gatherer, find_gathers
from megatron_lowbit.integration.stats import Counted, stats
from megatron_lowbit.integration.sync_points import Attachment, find_sync_points


@dataclass(frozen=True)
class SyncPointStatus:
    """What runs at one sync point of this rank.

    Attributes:
        layer: Megatron's layer number.
        name: Path under the layer.
        codec: The codec.
        bf16_features: How many features travel in BF16.
        traffic: What went through it so far; `stats()` has it by collective.
    """

    layer: int
    name: str
    codec: Codec
    bf16_features: int
    traffic: Counters


class Reducer:
    """Sums one sync point's partial through a codec and counts what it sends."""

    def __init__(
        self, codec: Codec, tables: Tables, group: dist.ProcessGroup, chooser: str | Chooser
    ):
        self.codec, self.tables, self.group, self.chooser = codec, tables, group, chooser
        self.traffic = Traffic()

    def __call__(self, partial: Tensor, scatter: bool) -> Tensor:
        if self.tables.bf16_index.device != partial.device:  # the model moved since `apply`
            self.tables = self.tables.to(partial.device)
        call = {
            "group": self.group,
            "codec": self.codec,
            "tables": self.tables,
            "collective": self.chooser,
            "traffic": self.traffic,
        }
        if scatter:
            return reduce_scatter(partial, **call)
        return all_reduce(partial, in_place=True, **call)


class Handle:
    """The low-bit path of one model; see the module's docstring."""

    def __init__(
        self,
        chosen: Chosen,
        chooser: Chooser,
        native: dict[str, str],
        gatherers: list[Gatherer],
        model: nn.Module | list[nn.Module],
    ):
        self.native, self._model = native, model
        self._points, self._origin = chosen.points, chosen.origin
        self._reducers = [
            Reducer(codec, tables, point.group, chooser)
            for codec, tables, point in zip(
                chosen.codecs, chosen.tables, chosen.points, strict=True
            )
        ]
        attached = Attachment(self._points, self._reducers)
        self._attachments = [attached, GatherAttachment(gatherers)]
        self._gatherers = gatherers

    def status(self) -> list[SyncPointStatus]:
        """Each sync point of this rank that runs in low bits; `native` names the others."""
        return [
            SyncPointStatus(
                point.layer,
                point.name,
                reducer.codec,
                reducer.tables.bf16_index.numel(),
                reducer.traffic.total(),
            )
            for point, reducer in zip(self._points, self._reducers, strict=True)
        ]

    def stats(self) -> dict:
        """What this rank sent since `apply`, as JSON can hold it; see `integration.stats`."""
        points = [
            Counted(point.layer, point.name, reducer.codec, reducer.traffic)
            for point, reducer in zip(self._points, self._reducers, strict=True)
        ]
        gathers = [Counted(g.layer, g.name, g.codec, g.traffic) for g in self._gatherers]
        return stats(points, gathers)

    def remove(self) -> None:
        """Give Megatron's own reduction back, exactly as it was. A second call does nothing.

        Raises:
            LowbitError: CUDA graphs were captured, which would go on in low bits.
        """
        if self._reducers:
            check_no_graphs(self._model, "remove()")
        for attachment in self._attachments:
            attachment.remove()
        self._points, self._reducers, self._gatherers = [], [], []

    def __str__(self) -> str:
        if not self._reducers:
            return "low-bit communication: removed"
        chooser, ranks = self._reducers[0].chooser, dist.get_world_size(self._points[0].group)
        text = (
            f"low-bit communication: {len(self._reducers)} sync points use "
            f"{_codecs(self._reducers)} ({self._origin}), {chooser.mode} over {ranks} ranks"
        )
        if ranks == 1:
            text += " (one rank: nothing is sent)"
        elif chooser.mode == "auto":
            text += f" ({chooser.spans()})"
        if self._gatherers:
            text += f"; {len(self._gatherers)} all-gathers in {self._gatherers[0].codec}"
        return f"{text}; {len(self.native)} stay native" + _listed(self.native)


def apply(
    model: nn.Module | Iterable[nn.Module],
    index_dir: str | Path | Index,
    *,
    codec: str | None = None,
    bits: int | tuple[int, int] | None = None,
    collective: str | Settings = DEFAULT_MODE,
    all_gather_bits: int | None = None,
    recipe: str | Path | None = None,
) -> Handle:
    """Switch the sync points of a Megatron-core model to low-bit payloads; call it on every rank.

    Args:
        model: A GPTModel of the local spec with its weights loaded, wrapped or not, or a list of
            model chunks; without CUDA graphs so far.
        index_dir: The index that tools/calibrate.py wrote for this model, or one already read.
        codec: A codec's name, for all sync points; by the index's recipe, or with its own codec,
            if left out.
        bits: Bits of a body value, or a pair: of partials, and of sums, for all sync points; by
            the index's recipe, or its own, if left out, or the codec's default for another codec.
        collective: A mode of `comm.choice.MODES`, or `Settings` with a tuning file or nodes.
        all_gather_bits: With sequence parallelism: bits of a value in the all-gather before
            each column-parallel linear; native BF16 if left out.
        recipe: A recipe file (`calibration.recipe`) whose rules come on top of the above.

    Returns:
        A handle with `status()`, `stats()` and `remove()`.

    Raises:
        LowbitError: On every rank: no or a damaged index, an index for
            another model, hidden size, layer count, or (where the codec's tables depend on it) TP
            degree; a bad recipe; an unknown codec or collective; a tuning file for another machine;
            a sync point that cannot be reached; CUDA graphs that are captured already, or settings
            of theirs that our work cannot be captured with; ranks that disagree.
    """
    settings = collective if isinstance(collective, Settings) else Settings(collective)
    model = model if isinstance(model, nn.Module) else list(model)
    points, native = on_every_rank(lambda: find_sync_points(model))
    on_every_rank(lambda: check_cuda_graphs(model, gathers=all_gather_bits is not None))
    rules = Path(recipe) if recipe is not None else None
    wishes = {"codec": codec, "bits": bits, "rules": rules}
    chosen = on_every_rank(lambda: choose(model, points, index_dir, **wishes))
    gatherers = []
    if all_gather_bits is not None:
        gatherers = on_every_rank(lambda: find_gathers(model, all_gather_bits))
    group = points[0].group
    codecs = sorted({repr(codec) for codec in chosen.codecs})
    dtype = str(points[0].module.weight.dtype)
    agreed = (codecs, all_gather_bits, dtype, chosen.digest())
    require_equal("codec, dtype or index", agreed, group=group)
    device = points[0].module.weight.device
    # One choice of collectives for all: a few bits more or less hardly move where each wins.
    first, tables = chosen.typical()
    chooser = make_chooser(settings, group=group, codec=first, tables=tables, device=device)
    return Handle(chosen, chooser, native | chosen.native, gatherers, model)


def _codecs(reducers: list[Reducer]) -> str:
    """Codecs, bits and BF16 features of all sync points, in words."""
    names = sorted({reducer.codec.name for reducer in reducers})
    hidden = reducers[0].tables.hidden
    kept = [reducer.tables.bf16_index.numel() for reducer in reducers]
    rows = [r.codec.row_bytes(r.tables) for r in reducers]
    sums = [r.codec.for_sum().row_bytes(r.tables.of_sum or r.tables) for r in reducers]
    text = (
        f"{', '.join(names)}, {_span(kept)} of {hidden} features in BF16, "
        f"{8 * sum(rows) / len(rows) / hidden:.2f} bits a value"
    )
    if len(set(rows)) > 1:
        low, high = 8 * min(rows) / hidden, 8 * max(rows) / hidden
        text += f" on average ({low:.2f} to {high:.2f})"
    if any(r.codec.name == CALIBRATED_CODEC and r.tables.center is None for r in reducers):
        text += ", not centred (the index is of a TP size that this one does not divide)"
    if any(r.codec.sum_bits != r.codec.bits for r in reducers):
        text += f" ({8 * sum(sums) / len(sums) / hidden:.2f} for sums)"
    return text


def _span(counts: list[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}-{max(counts)}"


def _listed(native: dict[str, str]) -> str:
    reasons: dict[str, int] = {}
    for reason in native.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return "".join(f" ({count}: {reason})" for reason, count in reasons.items())
