"""What a checkpoint's model sums, sync point by sync point, as the doctor needs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megatron_lowbit.codecs import DEFAULT_CODEC, get_codec
from megatron_lowbit.comm.agreement import gather_values, on_every_rank, require_some
from megatron_lowbit.comm.policy.timings import Kind
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.apply import apply
from megatron_lowbit.integration.arguments import INDEX_NAME
from megatron_lowbit.integration.handle import SyncPointStatus
from megatron_lowbit.integration.loops.checks import refuse_pipeline
from megatron_lowbit.integration.runtime import session
from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args
from megatron_lowbit.integration.sums.routes import may_scatter
from megatron_lowbit.integration.sums.sync_points import sync_points_here, why_none

_TP_FLAG = "--tensor-model-parallel-size"


@dataclass(frozen=True)
class ModelSums:
    """What one pass of a model sums.

    Attributes:
        kinds: Its sync points in low bits, by codec; those of 0 bits are not among them.
        skipped: How many have 0 bits.
        longest: Tokens that a prompt can have.
        group: The ranks that sum.
        device: Where the partials are.
        scatters: Whether it may reduce-scatter them.
        about: What it is, in a line.
        layers: What each layer's sync points get, and what stays native and why: lines.
        calibrate: The command that makes its calibration index, if it has none.
    """

    kinds: list[Kind]
    skipped: int
    longest: int
    group: dist.ProcessGroup
    device: torch.device
    scatters: bool
    about: str
    layers: list[str]
    calibrate: str | None

    @property
    def hidden(self) -> int:
        """Features of a token."""
        return self.kinds[0].tables.hidden


def load_sums(checkpoint: str, argv: Sequence[str], ranks: int) -> ModelSums:
    """Start Megatron, load the model of `checkpoint` and look at its sums; on every rank.

    The tensor-parallel size is the number of ranks, unless Megatron's `argv` says another.

    Raises:
        LowbitError: On every rank: no such checkpoint, one that cannot be loaded, a model that sums
            nothing over ranks.
    """
    if not Path(checkpoint).is_dir():
        raise LowbitError(f"--load {checkpoint}: no such directory")
    size = [] if any(word.split("=")[0] == _TP_FLAG for word in argv) else [_TP_FLAG, str(ranks)]
    args = parse_megatron_args(["--load", checkpoint, *size, *argv])
    refuse_pipeline(args)
    if args.tensor_model_parallel_size == 1:
        raise LowbitError(f"{_TP_FLAG} 1 sums nothing over ranks: give 2 or more")
    session.initialize(args)
    model, index = session.load_model(args), Path(checkpoint) / INDEX_NAME
    found = gather_values((index / "manifest.json").exists())
    if len(set(found)) > 1:
        lacking = [rank for rank, here in enumerate(found) if not here]
        raise LowbitError(f"{index} cannot be seen by ranks {lacking}: put it where all see it")
    sums = _calibrated if found[0] else _not_calibrated
    return sums(model, index, args.max_position_embeddings)


def _calibrated(model: nn.Module, index: Path, longest: int) -> ModelSums:
    """As `apply` would have it."""
    handle = apply(model, index, collective="one-shot")  # which times nothing
    status, kinds = handle.status(), handle.kinds
    native, layers = handle.native, _layers(status)
    about = str(handle).partition("low-bit communication: ")[2].partition(", one-shot over")[0]
    handle.remove()
    points, _ = sync_points_here(model)
    return ModelSums(
        kinds=[kind for kind in kinds if kind.codec.bits],
        skipped=sum(kind.count for kind in kinds if not kind.codec.bits),
        longest=longest,
        group=points[0].group,
        device=points[0].module.weight.device,
        scatters=may_scatter(point.module for point in points),
        about=about,
        layers=[*layers, *_native(native)],
        calibrate=None,
    )


def _not_calibrated(model: nn.Module, index: Path, longest: int) -> ModelSums:
    """By the default codec, which needs no calibration, and whose times are those of others."""
    points, native = on_every_rank(lambda: sync_points_here(model))
    require_some(points, why_none(model, native))
    weight, codec = points[0].module.weight, get_codec(DEFAULT_CODEC)
    hidden = weight.shape[0]
    return ModelSums(
        kinds=[Kind(codec, codec.tables(hidden, device=weight.device), len(points), True)],
        skipped=0,
        longest=longest,
        group=points[0].group,
        device=weight.device,
        scatters=may_scatter(point.module for point in points),
        about=f"{len(points)} sync points, no calibration index: as if all had {codec!r}",
        layers=_native(native),
        calibrate=f"python -m megatron_lowbit calibrate --load {index.parent} --data TEXT",
    )


def _layers(status: Sequence[SyncPointStatus]) -> list[str]:
    """A line for each run of layers that are alike."""
    by_layer: dict[int, list[str]] = {}
    for point in status:
        kept = f", {point.bf16_features} features in BF16" if point.bf16_features else ""
        apart = "" if point.feedback == "carried" else f", errors not carried ({point.feedback})"
        text = f"{point.name} {point.codec!r}{kept}{apart}"
        by_layer.setdefault(point.layer, []).append(text)
    runs: list[tuple[int, int, list[str]]] = []
    for layer, texts in by_layer.items():
        if runs and runs[-1][1:] == (layer - 1, texts):
            runs[-1] = (runs[-1][0], layer, texts)
        else:
            runs.append((layer, layer, texts))
    return [
        f"{f'layer {first}' if first == last else f'layers {first}-{last}'}: {'; '.join(texts)}"
        for first, last, texts in runs
    ]


def _native(native: dict[str, str]) -> list[str]:
    """What is not in low bits in any pass."""
    return [f"{name}: native ({why})" for name, why in sorted(native.items())]
