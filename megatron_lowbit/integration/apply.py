"""Switch a model's sync points to the low-bit path, and back.

    handle = megatron_lowbit.apply(model, "CKPT/lowbit")
    print(handle)            # one line: how many sync points, which codec, what stays native
    handle.status()          # each sync point, with its codec and traffic
    handle.stats()           # calls, bytes, time and choices, as JSON can hold them
    handle.remove()          # Megatron's own reduction again

Call it after the checkpoint is loaded and before the first forward pass: the index is checked
against the model's weights. The model's parameters, buffers and state_dict are not touched.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from megatron_lowbit.calibration.index import Index
from megatron_lowbit.calibration.index_files import read_index
from megatron_lowbit.codecs import Codec, Tables, get_codec
from megatron_lowbit.comm import all_reduce, reduce_scatter
from megatron_lowbit.comm.agreement import on_every_rank, require_equal
from megatron_lowbit.comm.choice import DEFAULT_MODE, Chooser, Settings, make_chooser
from megatron_lowbit.comm.traffic import Counters, Traffic
from megatron_lowbit.errors import IndexFileError
from megatron_lowbit.integration.gathers import GatherAttachment, Gatherer, find_gathers
from megatron_lowbit.integration.stats import Counted, stats
from megatron_lowbit.integration.sync_points import (
    Attachment,
    SyncPoint,
    find_sync_points,
    fingerprint,
    transformer_layers,
)

MODEL_SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")


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
        points: list[SyncPoint],
        reducers: list[Reducer],
        native: dict[str, str],
        gatherers: list[Gatherer],
    ):
        self.native = native
        self._points, self._reducers = points, reducers
        self._attachments = [Attachment(points, reducers), GatherAttachment(gatherers)]
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
        """Give Megatron's own reduction back, exactly as it was. A second call does nothing."""
        for attachment in self._attachments:
            attachment.remove()
        self._points, self._reducers, self._gatherers = [], [], []

    def __str__(self) -> str:
        if not self._reducers:
            return "low-bit communication: removed"
        first = self._reducers[0]
        ranks = dist.get_world_size(first.group)
        hidden, kept = first.tables.hidden, first.tables.bf16_index.numel()
        bits = f"{8 * first.codec.row_bytes(first.tables) / hidden:.2f} bits a value"
        if first.codec.sum_bits != first.codec.bits:
            sum_bytes = first.codec.for_sum().row_bytes(first.codec.sum_tables(first.tables))
            bits += f" ({8 * sum_bytes / hidden:.2f} for sums)"
        text = (
            f"low-bit communication: {len(self._reducers)} sync points use {first.codec.name}, "
            f"{kept} of {hidden} features in BF16, {bits}, {first.chooser.mode} over {ranks} ranks"
        )
        if ranks == 1:
            text += " (one rank: nothing is sent)"
        elif first.chooser.mode == "auto":
            text += f" ({first.chooser.spans()})"
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
) -> Handle:
    """Switch the sync points of a Megatron-core model to low-bit payloads; call it on every rank.

    Args:
        model: A GPTModel of the local spec with its weights loaded, wrapped or not, or a list of
            model chunks.
        index_dir: The index that tools/calibrate.py wrote for this model, or one already read.
        codec: A codec's name; the index's own if left out.
        bits: Bits of a body value, or a pair: of partials, and of sums; the index's, or the
            codec's default for another codec.
        collective: A mode of `comm.choice.MODES`, or `Settings` with a tuning file or nodes.
        all_gather_bits: With sequence parallelism: bits of a value in the all-gather before
            each column-parallel linear; native BF16 if left out.

    Returns:
        A handle with `status()`, `stats()` and `remove()`.

    Raises:
        LowbitError: On every rank: no or a damaged index, an index for
            another model, hidden size, layer count, or (where the codec's tables depend on it) TP
            degree; an unknown codec or collective; a tuning file for another machine; a sync point
            that cannot be reached; ranks that disagree.
    """
    settings = collective if isinstance(collective, Settings) else Settings(collective)
    points, native = on_every_rank(lambda: find_sync_points(model))
    chosen, tables = on_every_rank(lambda: _prepare(model, points, index_dir, codec, bits))
    gatherers = []
    if all_gather_bits is not None:
        gatherers = on_every_rank(lambda: find_gathers(model, all_gather_bits))
    group = points[0].group
    agreed = (repr(chosen), all_gather_bits, str(points[0].module.weight.dtype), _digest(tables))
    require_equal("codec, dtype or index", agreed, group=group)
    device = points[0].module.weight.device
    chooser = make_chooser(settings, group=group, codec=chosen, tables=tables[0], device=device)
    reducers = [Reducer(chosen, t, p.group, chooser) for t, p in zip(tables, points, strict=True)]
    return Handle(points, reducers, native, gatherers)


def model_identity(model: nn.Module | Iterable[nn.Module]) -> dict:
    """What an index remembers of its model: the shape, and a fingerprint of each layer here."""
    layers = transformer_layers(model)
    config = next(iter(layers.values())).config
    shape = {key: getattr(config, key) for key in MODEL_SHAPE}
    return {**shape, "fingerprints": {str(n): fingerprint(layer) for n, layer in layers.items()}}


def check_index(
    index: Index, model: nn.Module | Iterable[nn.Module], codec: Codec, tp_size: int
) -> None:
    """Raise `IndexFileError` unless `index` was made for `model` and serves `codec` here."""
    expected, found = index.manifest["model"], model_identity(model)
    for key in MODEL_SHAPE:
        if expected.get(key) != found[key]:
            raise IndexFileError(
                f"{index.origin} is for another model: its {key} is {expected.get(key)}, this "
                f"model's is {found[key]}; calibrate this model with tools/calibrate.py"
            )
    for layer, digest in found["fingerprints"].items():
        if expected["fingerprints"].get(layer) != digest:
            raise IndexFileError(
                f"{index.origin} was calibrated on other weights (layer {layer} differs); "
                "calibrate this checkpoint with tools/calibrate.py"
            )
    if codec.needs_statistics and index.tp_size != tp_size:
        raise IndexFileError(
            f"{index.origin} was calibrated at tensor parallel size {index.tp_size}, this run has "
            f"{tp_size}: {codec.name} has tables per rank, calibrate at {tp_size} or use a codec "
            "that fits any size (shaped-hybrid, rotated-hybrid)"
        )


def _prepare(model, points, index_dir, codec, bits) -> tuple[Codec, list[Tables]]:
    """Read and check everything that can fail, before anything is changed."""
    index = index_dir if isinstance(index_dir, Index) else read_index(Path(index_dir))
    chosen = choose_codec(index, codec, bits)
    ranks = dist.get_world_size(points[0].group)
    check_index(index, model, chosen, ranks)
    tables = [
        index.tables(p.layer, p.name, chosen, ranks=ranks, device=p.module.weight.device)
        for p in points
    ]
    return chosen, tables


def _digest(tables: list[Tables]) -> str:
    """Of all that sender and receiver must agree on."""
    digest = hashlib.sha256()
    for table in tables:
        of_sum = table.of_sum.scale if table.of_sum else None
        shared = (table.bf16_index, table.encode_scale, table.decode_scale)
        for tensor in (*shared, table.scale, table.center, of_sum):
            if tensor is not None:
                digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def choose_codec(index: Index, name: str | None, bits: int | tuple[int, int] | None) -> Codec:
    """The codec that was asked for; what was not said is taken from the index."""
    own = index.manifest["codec"]
    if name is None or name == own["name"]:
        return get_codec(own["name"], bits=bits if bits is not None else own["bits"])
    return get_codec(name, bits=bits)


def _listed(native: dict[str, str]) -> str:
    reasons: dict[str, int] = {}
    for reason in native.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return "".join(f" ({count}: {reason})" for reason, count in reasons.items())
