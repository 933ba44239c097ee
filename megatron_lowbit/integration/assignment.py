"""What each sync point of a model gets: by calibration index, recipe and the user's wishes.

Everything that can fail is read and checked here, before anything is changed.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import nn

from megatron_lowbit._moved import renamed
from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.calibration.index_files import read_index
from megatron_lowbit.calibration.recipe import (
    Assignment,
    Recipe,
    override,
    read_rules,
    with_strong_ends,
)
from megatron_lowbit.codecs import Codec, Tables, get_codec
from megatron_lowbit.comm.policy.timings import Kind
from megatron_lowbit.errors import IndexFileError, LowbitError
from megatron_lowbit.integration.sums.chain_check import agree
from megatron_lowbit.integration.sums.sync_points import SyncPoint, fingerprint, transformer_layers
from megatron_lowbit.model.stages import Stages
from megatron_lowbit.model.summing import chains

MODEL_SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")


@dataclass(frozen=True)
class AssignedPoints:
    """What the sync points of this rank get: none where its pipeline stage has no low bits.

    Attributes:
        points: Those that run in low bits.
        codecs: Of each of them.
        tables: Of each of them.
        native: Those that a rule leaves to Megatron, with the reason.
        origin: Where this comes from, for people.
        has_feedback: Whether errors are carried from sync point to sync point.
    """

    points: list[SyncPoint]
    codecs: list[Codec]
    tables: list[Tables]
    native: dict[str, str]
    origin: str
    has_feedback: bool = False

    def kinds(self) -> list[Kind]:
        """The sync points of a pass, by codec: what `auto` times."""
        names = [repr(codec) for codec in self.codecs]
        firsts = {name: names.index(name) for name in names}
        return [
            Kind(self.codecs[at], self.tables[at], names.count(name), self.has_feedback)
            for name, at in firsts.items()
        ]

    def digest(self) -> str:
        """Of all that sender and receiver must agree on."""
        names = [str(point) for point in self.points]
        agreed = (names, self.codecs, sorted(self.native), self.has_feedback)
        digest = hashlib.sha256(repr(agreed).encode())
        for table in self.tables:
            of_sum = table.of_sum.scale if table.of_sum else None
            shared = (table.bf16_index, table.encode_scale, table.decode_scale)
            for tensor in (*shared, table.scale, table.center, of_sum):
                if tensor is not None:
                    digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


def assign(
    model: nn.Module | Iterable[nn.Module],
    points: list[SyncPoint],
    index_dir: str | Path | CalibrationIndex,
    *,
    codec: str | None,
    bits: int | tuple[int, int] | None,
    rules: Path | None,
    feedback: bool | None = None,
) -> AssignedPoints:
    """Choose a codec and make its tables for each of a model's sync points on this rank.

    What is wished, and what is refused, is as for `apply`; `rules` is its recipe.
    """
    index = index_dir if isinstance(index_dir, CalibrationIndex) else read_index(Path(index_dir))
    recipe, origin = _recipe(index, codec, bits)
    own = index.recipe is recipe or (codec, bits) == (None, None)
    given = [] if rules is None else read_rules(rules)
    ruled = override(recipe, given, origin=str(rules))
    if rules is not None:
        origin += f" and {Path(rules).name}"
    if not points:
        return AssignedPoints([], [], [], {}, origin)
    ranks = dist.get_world_size(points[0].group)
    used = [a.make() for a in set(ruled.values()) if not a.is_native]
    check_index(index, model, used, ranks)
    if feedback is None:
        feedback = any(codec.carries for codec in used)
    if feedback:
        points = agree(points, index.manifest, index.origin)
        recipe = with_strong_ends(recipe, points) if own else recipe
        ruled = override(recipe, given, origin=str(rules))
    low, codecs, tables, native = [], [], [], {}
    for point in points:
        assignment = index.assigned(ruled, point)
        if assignment.is_native:
            assert rules is not None, "nothing else leaves a point native"
            native[str(point)] = f"left native by {Path(rules).name}"
            continue
        low.append(point)
        codecs.append(assignment.make())
        tables.append(index.tables_at(point, assignment, ranks))
    check_skips(low, codecs, feedback)
    if feedback and index.recipe is not None and not index.has_feedback:
        anew = "python -m megatron_lowbit calibrate --budget plans it anew"
        origin += f", planned without feedback ({anew})"
    return AssignedPoints(low, codecs, tables, native, origin, feedback)


def check_skips(points: list[SyncPoint], codecs: list[Codec], has_feedback: bool) -> None:
    """Raise `LowbitError` where a sync point of 0 bits would be lost."""
    skipped = {number for number, codec in enumerate(codecs) if codec.bits == 0}
    if skipped and not has_feedback:
        raise LowbitError(
            f"{points[min(skipped)]} has 0 bits, which only error feedback makes good: leave "
            "--lowbit-no-feedback and --lowbit-fold out, or plan a recipe without --skip"
        )
    for chain in chains(points):
        for number, following in zip(chain, [*chain[1:], None], strict=True):
            if number in skipped and (following is None or following in skipped):
                raise LowbitError(
                    f"{points[number]} has 0 bits, and no sync point with bits follows to send its "
                    "error: give this one or the next 1 bit or more"
                )
        skipped -= set(chain)
    if skipped:
        point = points[min(skipped)]
        raise LowbitError(
            f"{point} has 0 bits, and its error cannot be carried "
            f"({point.apart or 'no other sync point is in its chain'}): give it 1 bit or more"
        )


def model_identity(model: nn.Module | Iterable[nn.Module]) -> dict:
    """What an index remembers of its model: the shape, and a fingerprint of each layer here."""
    layers = transformer_layers(model)
    config = next(iter(layers.values())).config
    shape = {key: getattr(config, key) for key in MODEL_SHAPE}
    return {**shape, "fingerprints": {str(n): fingerprint(layer) for n, layer in layers.items()}}


def whole_identity(model: nn.Module, stages: Stages) -> dict:
    """`model_identity` with the layers of all stages; call it on every rank."""
    parts = stages.gather(model_identity(model))
    fingerprints = {n: digest for part in parts for n, digest in part["fingerprints"].items()}
    return {**parts[0], "fingerprints": fingerprints}


def check_index(
    index: CalibrationIndex,
    model: nn.Module | Iterable[nn.Module],
    codecs: Iterable[Codec],
    tp_size: int,
) -> None:
    """Raise `IndexFileError` unless `index` was made for `model` and serves `codecs` here."""
    expected, found = index.manifest["model"], model_identity(model)
    for key in MODEL_SHAPE:
        if expected.get(key) != found[key]:
            raise IndexFileError(
                f"{index.origin} is for another model: its {key} is {expected.get(key)}, this "
                f"model's is {found[key]}; calibrate this model with python -m megatron_lowbit "
                "calibrate"
            )
    for layer, digest in found["fingerprints"].items():
        if expected["fingerprints"].get(layer) != digest:
            raise IndexFileError(
                f"{index.origin} was calibrated on other weights (layer {layer} differs); "
                "calibrate this checkpoint with python -m megatron_lowbit calibrate"
            )
    for codec in codecs:
        if codec.needs_statistics and index.tp_size != tp_size:
            raise IndexFileError(
                f"{index.origin} was calibrated at tensor parallel size {index.tp_size}, this run "
                f"has {tp_size}: {codec.name} has tables per rank, calibrate at {tp_size} or use a "
                "codec that fits any size (shaped-hybrid, rotated-hybrid)"
            )


def _recipe(
    index: CalibrationIndex, name: str | None, bits: int | tuple[int, int] | None
) -> tuple[Recipe, str]:
    """An assignment for every sync point of the index, and where it comes from."""
    own = index.manifest["codec"]
    if name is None and bits is None and index.recipe is not None:
        return index.recipe, "the calibration index's recipe"
    if bits is None and name in (None, own["name"]):
        bits = own["bits"]
    name = name or own["name"]
    get_codec(name, bits=bits)
    keys = [(layer, point) for layer, points in index.layers.items() for point in points]
    origin = "one codec, the calibration index's recipe set aside" if index.recipe else "one codec"
    return dict.fromkeys(keys, Assignment(name, bits)), origin


__getattr__ = renamed(__name__)
