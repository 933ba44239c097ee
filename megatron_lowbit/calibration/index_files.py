"""Index files: reading, writing and validating an index directory.

    DIR/manifest.json             format version, model shape, TP size, codec, recipe if there is
                                  one (`calibration.plan`), corpus, versions, chain: why each
                                  sync point carries no errors on, empty if it does,
                                  file and sha256 of each layer, sha256 of the manifest itself
    DIR/layer_NNNNN.safetensors   per sync point NAME: NAME/bf16_index int32 [k] and
                                  NAME/{minimum,maximum,mean,second_moment} fp32 [ranks, hidden]
                                  and, of the sum over ranks,
                                  NAME/sum_{minimum,maximum,mean,second_moment} fp32 [hidden];
                                  with a recipe, fp64 [options], NAME/divergence, the same with
                                  error feedback NAME/divergence_carried, NAME/handed_on,
                                  NAME/missed, and of sums NAME/sum_{divergence,
                                  divergence_carried,handed_on} (`calibration.plan`);
                                  the layer's number is in the metadata

JSON and safetensors only: reading a stranger's index runs no code. Everything is checked when an
index is read, so that no damaged file is met in the middle of a forward pass. The checksums find
damage and careless edits; they are no signature. So what is behind them is not believed either:
types and ranges (`calibration.validation.index_schema`), and statistics that no data can give
(`calibration.validation.impossible`).
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.calibration.layer_files import layer_bytes, read_layer
from megatron_lowbit.calibration.recipe import Assignment
from megatron_lowbit.calibration.validation.index_schema import FORMAT_VERSION, Assigned, Manifest
from megatron_lowbit.errors import IndexFileError, LowbitError
from megatron_lowbit.files import atomic_directory, check_writable, write
from megatron_lowbit.json_files import digest, read_json, shown
from megatron_lowbit.schema import validated

MANIFEST = "manifest.json"
_REMEDY = "calibrate again with python -m megatron_lowbit calibrate"


def check_destination(directory: Path) -> None:
    """Raise if an index cannot be written to `directory`: before hours of work, not after.

    Raises:
        IndexFileError: Something is there that is not an index, so it is not ours to replace.
        OSError: The place cannot be written to.
    """
    is_empty = directory.is_dir() and not any(directory.iterdir())
    if directory.exists() and not is_empty and not _is_index(directory):
        raise IndexFileError(
            f"{directory} exists and is not a calibration index: name another directory"
        )
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
            name, data = _layer_file(layer), layer_bytes(layer, records)
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
    checked = Manifest.model_validate(manifest)
    layers = {
        int(layer): read_layer(directory / entry.file, int(layer), checked, remedy=_REMEDY)
        for layer, entry in checked.layers.items()
    }
    if checked.recipe is not None:
        planned = {int(layer): set(names) for layer, names in checked.recipe.points.items()}
        if planned != {layer: set(records) for layer, records in layers.items()}:
            raise IndexFileError(
                f"{directory / MANIFEST}: recipe.points are not the sync points that the layers' "
                f"files have; {_REMEDY}"
            )
    return CalibrationIndex(manifest=manifest, layers=layers, origin=str(directory))


def _layer_file(layer: int) -> str:
    return f"layer_{layer:05d}.safetensors"


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Of the manifest: it covers the digests of all layer files, so it identifies the index."""
    return digest(manifest)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read and validate the manifest alone, to fail before a checkpoint is loaded.

    Raises:
        IndexFileError: As `read_index`.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise IndexFileError(
            f"no calibration index at {directory} ({MANIFEST} is missing): make one with "
            "`torchrun --nproc-per-node TP -m megatron_lowbit calibrate --load CKPT --data TEXT`"
        )
    manifest = read_json(path, error=IndexFileError, remedy=_REMEDY)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is not int:
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
    checked = validated(Manifest, manifest, str(path), error=IndexFileError, remedy=_REMEDY)
    try:
        _check(checked)
    except LowbitError as error:
        raise IndexFileError(f"{path}: {error}; {_REMEDY}") from None
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise LowbitError for what the types alone do not tell."""
    layers, shape = sorted(map(int, manifest.layers)), manifest.model
    if layers != list(range(1, shape.num_layers + 1)):
        some = ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")
        raise LowbitError(f"it lists layers {some}, not 1 to {shape.num_layers} (model.num_layers)")
    for layer, entry in manifest.layers.items():
        if entry.file != _layer_file(int(layer)):
            raise LowbitError(
                f"layers.{layer}.file is {shown(entry.file)}, not {_layer_file(int(layer))}"
            )
    own = manifest.codec
    assigned = {"codec": (own.name, own.bits, own.bf16_features)}
    if manifest.recipe is not None:
        for number, option in enumerate(manifest.recipe.options):
            where = f"recipe.options[{number}].choice"
            assigned[where] = _values(option.choice)
            if isinstance(option.choice.bits, list):
                raise LowbitError(f"{where}.bits is a pair: options have one number for both")
        for layer, of_layer in manifest.recipe.points.items():
            for name, choice in of_layer.items():
                assigned[f"recipe.points.{layer}.{name}"] = _values(choice)
    for where, values in assigned.items():
        try:
            Assignment(*values).check(shape.hidden_size)
        except LowbitError as error:
            raise LowbitError(f"{where}: {error}") from None


def _values(choice: Assigned) -> tuple:
    bits = tuple(choice.bits) if isinstance(choice.bits, list) else choice.bits
    return choice.codec, bits, choice.bf16_features
