"""Index files: reading, writing and validating an index directory.

    DIR/manifest.json             format version, model shape, TP size, codec, recipe if there is
                                  one (`calibration.plan`), corpus, versions, chain: why each
                                  sync point carries no errors on, empty if it does,
                                  file and sha256 of each layer, sha256 of the manifest itself
    DIR/layer_NNNNN.safetensors   per sync point NAME: NAME/bf16_index int32 [k] and
                                  NAME/{minimum,maximum,mean,second_moment} fp32 [ranks, hidden]
                                  and, of the sum over ranks,
                                  NAME/sum_{minimum,maximum,mean,second_moment} fp32 [hidden];
                                  with a recipe NAME/divergence fp64 [options], and
                                  NAME/divergence_carried, the same with error feedback

JSON and safetensors only: reading a stranger's index runs no code. Everything is checked when an
index is read, so that no damaged file is met in the middle of a forward pass. The checksums find
damage and careless edits; they are no signature.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from megatron_lowbit.calibration.index import (
    STATISTICS,
    SUM_STATISTICS,
    CalibrationIndex,
    SyncPointRecord,
)
from megatron_lowbit.calibration.recipe import Assignment
from megatron_lowbit.codecs import CODECS
from megatron_lowbit.errors import IndexFileError
from megatron_lowbit.files import atomic_directory, check_writable, write

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
_REMEDY = "make the index again with tools/calibrate.py"

# The manifest's keys and what they hold; nested keys with a dot.
_SCHEMA: dict[str, type] = {
    "model": dict,
    "model.num_layers": int,
    "model.hidden_size": int,
    "model.fingerprints": dict,
    "tp_size": int,
    "codec": dict,
    "codec.name": str,
    "codec.bits": int,
    "corpus": dict,
    "layers": dict,
}


def check_destination(directory: Path) -> None:
    """Raise if an index cannot be written to `directory`: before hours of work, not after.

    Raises:
        IndexFileError: Something is there that is not an index, so it is not ours to replace.
        OSError: The place cannot be written to.
    """
    is_empty = directory.is_dir() and not any(directory.iterdir())
    if directory.exists() and not is_empty and not _is_index(directory):
        raise IndexFileError(f"{directory} exists and is not an index: name another directory")
    check_writable(directory.absolute().parent)


def _is_index(directory: Path) -> bool:
    """Whether a directory holds nothing but what `write_index` writes."""
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    layers = {name for name in names if re.fullmatch(r"layer_\d+\.safetensors", name)}
    return MANIFEST in names and names == layers | {MANIFEST}


def write_index(index: CalibrationIndex, directory: Path) -> None:
    """Write `index` as `directory`, all of it or nothing; an index that is there is replaced.

    Raises:
        IndexFileError: Something is there that is not an index.
        OSError: The directory cannot be written (the message names the file); nothing is left.
    """
    check_destination(directory)
    with atomic_directory(directory) as staging:
        files = {}
        for layer, records in sorted(index.layers.items()):
            name = f"layer_{layer:05d}.safetensors"
            data = safetensors.torch.save(_to_tensors(records))
            write(staging / name, data)
            files[str(layer)] = {"file": name, "sha256": hashlib.sha256(data).hexdigest()}
        manifest = {**index.manifest, "format_version": FORMAT_VERSION, "layers": files}
        manifest["sha256"] = manifest_digest(manifest)
        write(staging / MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")


def read_index(directory: Path) -> CalibrationIndex:
    """Read and validate an index directory.

    Raises:
        IndexFileError: It is missing, damaged, edited, incomplete, or of another format version;
            the message names the file and the remedy.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    layers = {}
    for layer, entry in manifest["layers"].items():
        path = directory / Path(str(entry["file"])).name
        tensors = _read_layer(path, entry["sha256"])
        layers[int(layer)] = _to_records(tensors, path, manifest)
    expected = set(range(1, manifest["model"]["num_layers"] + 1))
    if set(layers) != expected:
        listed = ", ".join(map(str, sorted(layers)))
        raise IndexFileError(
            f"{directory / MANIFEST} lists layers {listed}, not 1 to {max(expected)}: {_REMEDY}"
        )
    return CalibrationIndex(manifest=manifest, layers=layers, origin=str(directory))


def manifest_digest(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest without its own digest, in canonical JSON.

    It covers the digests of all layer files, so it identifies the whole index.
    """
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read and validate the manifest alone, to fail before a checkpoint is loaded.

    Raises:
        IndexFileError: As `read_index`.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise IndexFileError(
            f"no low-bit index at {directory} ({MANIFEST} is missing): make one with "
            "`torchrun --nproc-per-node TP tools/calibrate.py --load CHECKPOINT --data TEXT`"
        )
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise IndexFileError(f"{path} is not valid JSON ({error}): {_REMEDY}") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise IndexFileError(f"{path} has no format_version: {_REMEDY}")
    if version > FORMAT_VERSION:
        raise IndexFileError(
            f"{path} has format version {version}, this release reads {FORMAT_VERSION}: update "
            "megatron_lowbit"
        )
    if version < FORMAT_VERSION:
        raise IndexFileError(
            f"{path} has format version {version}, of an older release than this, which reads "
            f"{FORMAT_VERSION}: {_REMEDY}"
        )
    if manifest.get("sha256") != manifest_digest(manifest):
        raise IndexFileError(f"{path} was changed after it was written: {_REMEDY}")
    _check_schema(manifest, path)
    return manifest


def _check_schema(manifest: dict[str, Any], path: Path) -> None:
    for key, kind in _SCHEMA.items():
        value: Any = manifest
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise IndexFileError(f"{path} has no valid {key!r} (a {kind.__name__}): {_REMEDY}")
    if manifest["codec"]["name"] not in CODECS:
        name = manifest["codec"]["name"]
        raise IndexFileError(f"{path} names codec {name!r}: known are {', '.join(CODECS)}")
    chain = manifest.get("chain", {})
    if not isinstance(chain, dict) or not all(isinstance(why, str) for why in chain.values()):
        raise IndexFileError(f"{path} has no valid 'chain' (reasons by sync point): {_REMEDY}")
    if "recipe" in manifest:
        _check_recipe(manifest["recipe"], path)
    for layer, entry in manifest["layers"].items():
        if not (layer.isdigit() and isinstance(entry, dict) and {"file", "sha256"} <= set(entry)):
            raise IndexFileError(f"{path} has a bad entry for layer {layer!r}: {_REMEDY}")


def _check_recipe(recipe: Any, path: Path) -> None:
    try:
        assignments = [entry["choice"] for entry in recipe["options"]]
        assignments += [c for of_layer in recipe["points"].values() for c in of_layer.values()]
        for assignment in assignments:
            Assignment(**assignment).make()
        bits = [float(entry["bits_per_value"]) for entry in recipe["options"]]
        layers = [int(layer) for layer in recipe["points"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IndexFileError(f"{path} has no valid recipe ({error}): {_REMEDY}") from None
    if not bits or not layers:
        raise IndexFileError(f"{path} has an empty recipe: {_REMEDY}")


def _read_layer(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise IndexFileError(f"{path} is missing: {_REMEDY}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise IndexFileError(f"{path} is damaged (its sha256 is not the manifest's): {_REMEDY}")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise IndexFileError(f"{path} is not a safetensors file ({error}): {_REMEDY}") from None


def _to_tensors(records: dict[str, SyncPointRecord]) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.contiguous()
        for name, record in records.items()
        for key, value in vars(record).items()
        if value is not None
    }


def _to_records(
    tensors: dict[str, Tensor], path: Path, manifest: dict[str, Any]
) -> dict[str, SyncPointRecord]:
    """Records of one layer's tensors, each tensor's presence, shape and values checked."""
    hidden, ranks = manifest["model"]["hidden_size"], manifest["tp_size"]
    options = len(manifest["recipe"]["options"]) if "recipe" in manifest else 0
    records = {}
    for name in sorted({key.rpartition("/")[0] for key in tensors}):
        keys = ["bf16_index", *STATISTICS, *SUM_STATISTICS]
        keys += ["divergence"] if "recipe" in manifest else []
        keys += ["divergence_carried"] if "feedback" in manifest.get("recipe", {}) else []
        fields: dict[str, Any] = {key: tensors.get(f"{name}/{key}") for key in keys}
        for key, value in fields.items():
            problem = _problem(key, value, ranks, hidden, options)
            if problem:
                raise IndexFileError(f"{path}: {name}/{key} {problem}: {_REMEDY}")
        records[name] = SyncPointRecord(**fields)
    return records


def _problem(key: str, value: Tensor | None, ranks: int, hidden: int, options: int) -> str | None:
    """What is wrong with one tensor of a layer file, or None."""
    if value is None:
        return "is missing"
    if key == "bf16_index":
        if value.dtype != torch.int32 or value.ndim != 1:
            return f"is {value.dtype} {list(value.shape)}, not int32 [k]"
        ascending = bool((value[1:] > value[:-1]).all())
        inside = bool(((value >= 0) & (value < hidden)).all())
        return None if ascending and inside else f"is not ascending within 0..{hidden - 1}"
    shape = [hidden] if key in SUM_STATISTICS else [ranks, hidden]
    shape, dtype = (
        ([options], torch.float64) if key.startswith("divergence") else (shape, torch.float32)
    )
    if value.dtype != dtype or list(value.shape) != shape:
        return f"is {value.dtype} {list(value.shape)}, not {str(dtype)[6:]} {shape}"
    return None if bool(value.isfinite().all()) else "is not finite"
