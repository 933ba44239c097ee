"""The file of one layer of a calibration index: its sync points' records, as safetensors.

Everything in it is checked when it is read: which tensors there are, their dtypes, shapes and
values, and that it is this layer's.
"""

import hashlib
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from megatron_lowbit.calibration.costs.stored import COSTS, MISSED, SUM_COSTS
from megatron_lowbit.calibration.index import SUM_STATISTICS, SyncPointRecord
from megatron_lowbit.calibration.statistics import STATISTICS
from megatron_lowbit.calibration.validation.impossible import impossible
from megatron_lowbit.calibration.validation.index_schema import Manifest
from megatron_lowbit.errors import IndexFileError
from megatron_lowbit.json_files import parse_json, read_regular, shown
from megatron_lowbit.schema import Name

_MOST_POINTS = 64  # in a layer; Megatron's have two or three
_HEADER = 1 << 20  # bytes
_COSTS = len(COSTS) + len(SUM_COSTS) + 1
_MOST_NATS = 1e30  # of an option: beyond all divergences, and sums of them are finite
_LARGEST = 1 << 28  # bytes of a file, whatever the manifest says
_NAME = TypeAdapter(Name)


def layer_bytes(layer: int, records: dict[str, SyncPointRecord]) -> bytes:
    """The content of a layer's file."""
    tensors = {
        f"{name}/{key}": value.contiguous()
        for name, record in records.items()
        for key, value in vars(record).items()
        if value is not None
    }
    return safetensors.torch.save(tensors, metadata={"layer": str(layer)})


def read_layer(
    path: Path, layer: int, manifest: Manifest, *, remedy: str
) -> dict[str, SyncPointRecord]:
    """Read and check one layer's file.

    Args:
        path: Of the file.
        layer: Its number.
        manifest: Of the index.
        remedy: What to do about a bad one, for messages.

    Raises:
        IndexFileError: It is missing, no regular file, damaged, another layer's, or not what the
            manifest says; the message names the file, the tensor and the remedy.
    """
    data = _read(path, manifest, remedy)
    if hashlib.sha256(data).hexdigest() != manifest.layers[str(layer)].sha256:
        raise IndexFileError(f"{path} is damaged (its sha256 is not the manifest's): {remedy}")
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, RuntimeError, KeyError) as error:
        text = shown(str(error))
        raise IndexFileError(f"{path} is not a safetensors file ({text}): {remedy}") from None
    found = _layer_of(data, path, remedy)
    if found not in (None, str(layer)):
        raise IndexFileError(f"{path} is of layer {shown(found)}, not of layer {layer}: {remedy}")
    try:
        return _records(tensors, manifest)
    except ValueError as error:
        raise IndexFileError(f"{path}: {error}; {remedy}") from None


def _read(path: Path, manifest: Manifest, remedy: str) -> bytes:
    if not path.exists():
        raise IndexFileError(f"{path} is missing: {remedy}")
    options = len(manifest.recipe.options) if manifest.recipe else 0
    rows = len(STATISTICS) * manifest.tp_size + len(SUM_STATISTICS) + 1  # and the BF16 index
    point = rows * 4 * manifest.model.hidden_size + 8 * _COSTS * options
    largest = min(_HEADER + _MOST_POINTS * point, _LARGEST)
    return read_regular(path, largest=largest, error=IndexFileError, remedy=remedy)


def _layer_of(data: bytes, path: Path, remedy: str) -> object:
    """The layer that a file says it is of; None where it says nothing, as older ones."""
    length = int.from_bytes(data[:8], "little")
    where = f"the header of {path}"
    header = parse_json(data[8 : 8 + length], where, error=IndexFileError, remedy=remedy)
    return header.get("__metadata__", {}).get("layer")


def _records(tensors: dict[str, Tensor], manifest: Manifest) -> dict[str, SyncPointRecord]:
    """Records of one layer's tensors; ValueError for the first that is wrong."""
    keys = ["bf16_index", *STATISTICS, *SUM_STATISTICS]
    keys += _divergences(manifest)
    names = sorted({key.rpartition("/")[0] for key in tensors})
    for name in names:
        try:
            _NAME.validate_python(name)
        except ValidationError:
            raise ValueError(f"{shown(name)} cannot be the name of a sync point") from None
    if not names:
        raise ValueError("no sync point")
    unknown = set(tensors) - {f"{name}/{key}" for name in names for key in keys}
    if unknown:
        raise ValueError(f"unknown tensor {shown(min(unknown))}")
    return {
        name: _record({key: tensors.get(f"{name}/{key}") for key in keys}, name, manifest)
        for name in names
    }


def _divergences(manifest: Manifest) -> list[str]:
    """What is kept of the options of a recipe, if there is one."""
    if manifest.recipe is None:
        return []
    if manifest.recipe.sum_bits_per_value is not None:
        return [*COSTS, MISSED, *SUM_COSTS]
    return list(COSTS[:2] if manifest.recipe.feedback is not None else COSTS[:1])


def _record(fields: dict[str, Any], name: str, manifest: Manifest) -> SyncPointRecord:
    for key, value in fields.items():
        if problem := _problem(key, value, manifest):
            raise ValueError(f"{name}/{key} {problem}")
    for prefix, keys in (("", STATISTICS), ("sum_", SUM_STATISTICS)):
        low, high, mean, square = (fields[key] for key in keys)
        if problem := impossible(low, high, mean, square, manifest.corpus):
            raise ValueError(f"{name}/{prefix}*: the {problem}")
    return SyncPointRecord(**fields)


def _problem(key: str, value: Tensor | None, manifest: Manifest) -> str | None:
    """What is wrong with one tensor by itself, or None."""
    if value is None:
        return "is missing"
    hidden = manifest.model.hidden_size
    if key == "bf16_index":
        return _index_problem(value, manifest.codec.bf16_features, hidden)
    shape = [hidden] if key in SUM_STATISTICS else [manifest.tp_size, hidden]
    dtype = torch.float32
    of_options = key in _divergences(manifest)
    if of_options and manifest.recipe is not None:
        shape, dtype = [len(manifest.recipe.options)], torch.float64
    if value.dtype != dtype or list(value.shape) != shape:
        return f"is {value.dtype} {list(value.shape)}, not {str(dtype)[6:]} {shape}"
    if not bool(value.isfinite().all()):
        return "is not finite"
    if of_options and bool((value < 0).any()):
        return f"is {value.min():.3g}, below zero"
    most = 1.0 if key == MISSED else _MOST_NATS
    if of_options and bool((value > most).any()):
        return f"is {value.max():.3g}, above {most:g}"
    return None


def _index_problem(value: Tensor, features: int | None, hidden: int) -> str | None:
    if value.dtype != torch.int32 or value.ndim != 1:
        return f"is {value.dtype} {list(value.shape)}, not int32 [k]"
    ascending = bool((value[1:] > value[:-1]).all())
    inside = bool(((value >= 0) & (value < hidden)).all())
    if not (ascending and inside):
        return f"is not ascending within 0..{hidden - 1}"
    if features is not None and len(value) != features:
        return f"has {len(value)} features, the manifest says {features}"
    return None
