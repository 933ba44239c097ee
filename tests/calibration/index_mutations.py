"""Calibration indexes with something wrong, and what must hold of them: refused, or harmless.

A seed makes a mutation: of bytes, of a value or a type or the structure of the manifest, of a
tensor, or of a file as such; re-signed or not. `outcome` reads the index. Either it is refused in
one line, or its tables are finite, take the bits that they claim, and the codecs keep their
promise: on data of the claimed means and energy, whose features are alike, a codec is at most
12 dB (`codecs.variance.MOST_COST`) and 2 dB of chance behind what its codebook gives.
"""

import hashlib
import itertools
import json
import math
import os
import random
import shutil
from functools import cache
from pathlib import Path

import safetensors.torch
import torch

from megatron_lowbit.calibration.costs.stored import COSTS, SUM_COSTS
from megatron_lowbit.calibration.index import CalibrationIndex, SyncPointRecord, select_bf16_index
from megatron_lowbit.calibration.index_files import manifest_digest, read_index, write_index
from megatron_lowbit.calibration.plan import (
    Options,
    average_bits,
    plan,
    predicted_divergence,
)
from megatron_lowbit.calibration.recipe import Assignment
from megatron_lowbit.calibration.statistics import RunningStatistics, summarize
from megatron_lowbit.codecs import Tables
from megatron_lowbit.errors import LowbitError

HIDDEN, RANKS, LAYERS, TOKENS, SEQUENCES = 64, 2, 2, 32, 6
NAMES = ("self_attention.linear_proj", "mlp.linear_fc2")
_NOMINAL = {1: 4.4, 2: 9.3, 3: 14.6, 4: 20.2, 5: 26.0, 6: 31.8, 16: 40.0}  # dB of a Gaussian row
_BEHIND = 14.0
_STATIC = -1.0  # static-hybrid knows ranges only: the worst of them give nothing at all
_VALUES = [
    -1, 0, 1, 2, 3, 7, 1.5, 4.0, True, False, None, "", "x", "4", "²", "01", "a\0b", [], {}, [4, 4],
    [4], [[]], 10**9, 2**63, -(2**63), 5 * 10**7, 1e308, -1e308, "rotated-hybrid", "native",
    "bf16", "../manifest.json", "/dev/zero", "layer_00002.safetensors", "\ud800", {"codec": "bf16"},
]  # fmt: skip
_KEYS = ["extra", "01", "²", "3", "a\0", "variant", "codec", "format_version"]
_TEXTS = ["1" * 400, "1e400", "NaN", "-Infinity", "[" * 5000, '{"a": 1, "a": 2}', '"\\ud800"']
_FLOATS = [0.0, -1.0, 1.0, 1e-30, 1e-45, 1e5, 1e10, 1e18, 1e38, -1e38, math.nan, math.inf]


def make(directory: Path) -> None:
    """Write a whole index, of statistics that were really collected, with a recipe."""
    generator = torch.Generator().manual_seed(0)
    layers: dict[int, dict[str, SyncPointRecord]] = {}
    for layer in range(1, LAYERS + 1):
        layers[layer] = {name: _record(generator) for name in NAMES}
    choices = [Assignment("shaped-hybrid", bits, 2).to_json() for bits in (2, 4, 6)]
    choices.append(Assignment("bf16", 16).to_json())
    given = [Assignment("shaped-hybrid", (2, 4), 2).to_json(), *choices[1:]]
    points = {
        str(layer): {name: given[(layer + at) % 4] for at, name in enumerate(NAMES)}
        for layer in layers
    }
    manifest = {
        "model": {"num_layers": LAYERS, "hidden_size": HIDDEN, "fingerprints": {"1": "a"}},
        "tp_size": RANKS,
        "codec": {"name": "shaped-hybrid", "bits": 4, "bf16_features": 2},
        "corpus": {"sha256": "0", "sequences": SEQUENCES, "seq_length": TOKENS},
        "versions": {"torch": "2"},
        "recipe": {
            "budget": 4.2,
            "feedback": True,
            "bits_per_value": 4.1,
            "sum_bits_per_value": 4.2,
            "predicted_divergence": 0.1,
            "predicted_two_shot": 0.2,
            "points": points,
            "options": [{"choice": c, "bits_per_value": c["bits"] + 0.2} for c in choices],
        },
    }
    write_index(CalibrationIndex(manifest, layers), directory)


def _record(generator: torch.Generator) -> SyncPointRecord:
    statistics = RunningStatistics(RANKS + 1, HIDDEN)
    scale = torch.rand(HIDDEN, generator=generator) + 0.5
    scale[:2] *= 30
    for _ in range(SEQUENCES):
        partials = torch.randn(RANKS, TOKENS, HIDDEN, generator=generator) * scale + 0.3
        rows = [*partials, partials.sum(dim=0)]
        statistics.fold(torch.stack([summarize(row) for row in rows]), TOKENS)
    *partials, total = statistics.result()
    ranges = torch.stack([2 * torch.maximum(p[0].abs(), p[1].abs()) for p in partials])
    divergence = torch.tensor([0.4, 0.02, 0.001, 0.0], dtype=torch.float64)
    costs = {name: divergence.clone() for name in (*COSTS, *SUM_COSTS)}
    return SyncPointRecord(
        select_bf16_index(ranges, 2),
        *torch.stack(partials, dim=1),
        *total,
        **costs,
        missed=torch.tensor([0.12, 0.01, 0.001, 0.0], dtype=torch.float64),
    )


def mutate(directory: Path, seed: int) -> str:
    """Make the index in `directory` wrong; what was done, in words."""
    rng = random.Random(seed)
    kind = rng.choice([_bytes, _manifest, _manifest, _manifest, _tensor, _tensor, _tensor, _file])
    what = kind(directory, rng)
    signed = rng.random() < 0.8
    if signed:
        resign(directory)
    return f"{what}{', signed again' if signed else ''}"


def resign(directory: Path) -> None:
    """Make the checksums fit, where there is still something to sign."""
    path = directory / "manifest.json"
    if not path.is_file():
        return
    try:
        manifest = json.loads(path.read_bytes())
        for entry in manifest["layers"].values():
            file = directory / entry["file"]
            if file.is_file():
                entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    except (ValueError, OSError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    try:
        manifest["sha256"] = manifest_digest(manifest)
        path.write_text(json.dumps(manifest))
    except (NameError, TypeError, OSError, AttributeError, UnicodeError):
        pass


def _bytes(directory: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(directory.iterdir()))
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 5])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    path.write_bytes(data)
    return f"bits of {path.name}"


def _places(value, found: list, path: str = "") -> list:
    """Every place in a JSON value: its container, its key, its path."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        found.append((value, key, f"{path}.{key}"))
        if isinstance(value[key], dict | list):
            _places(value[key], found, f"{path}.{key}")
    return found


def _manifest(directory: Path, rng: random.Random) -> str:
    path = directory / "manifest.json"
    return change_json(json.loads(path.read_bytes()), path, rng)


def change_json(content, path: Path, rng: random.Random) -> str:
    """Write a JSON value with one thing in it changed; what it was, in words."""
    container, key, where = rng.choice(_places(content, []))
    action = rng.choice(["value", "value", "value", "text", "remove", "rename", "add", "copy"])
    done = f"{action} {where}"
    if action == "value":
        container[key] = rng.choice(_VALUES)
        done += f" {container[key]!r}"
    elif action == "text":
        text, container[key] = rng.choice(_TEXTS), "@"
        path.write_text(json.dumps(content).replace('"@"', text))
        return f"{done} {text[:20]}"
    elif action == "copy":
        other, other_key, from_where = rng.choice(_places(content, []))
        container[key] = json.loads(json.dumps(other[other_key]))
        done += from_where
    elif isinstance(container, list):
        container.append(container.pop(key) if action == "rename" else rng.choice(_VALUES))
    elif action == "add":
        container[rng.choice(_KEYS)] = rng.choice(_VALUES)
    else:
        held = container.pop(key)
        if action == "rename":
            container[rng.choice(_KEYS)] = held
    path.write_text(json.dumps(content))
    return done


def _tensor(directory: Path, rng: random.Random) -> str:
    path = directory / f"layer_0000{rng.randint(1, LAYERS)}.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    name = rng.choice(sorted(tensors))
    values, flat = tensors[name], tensors[name].view(-1)
    action = rng.choice("scale bit element several all cast shape drop swap noise".split())
    at = rng.randrange(len(flat))
    if action == "scale":
        tensors[name] = (values * 10.0 ** rng.randint(-30, 30)).to(values.dtype)
    elif action == "bit":
        raw = flat.view(torch.int64 if flat.dtype == torch.float64 else torch.int32)
        raw[at] ^= 1 << rng.randrange(31)
    elif action == "element":
        flat[at] = _as(rng.choice(_FLOATS), flat)
    elif action == "several":
        flat[torch.rand(len(flat)) < rng.random()] = _as(rng.choice(_FLOATS), flat)
    elif action == "all":
        flat.fill_(_as(rng.choice(_FLOATS), flat))
    elif action == "cast":
        tensors[name] = values.to(rng.choice([torch.float16, torch.int64, torch.bool]))
    elif action == "shape":
        tensors[name] = rng.choice([flat, values[..., :-1], values[None], values[:0]]).contiguous()
    elif action == "drop":
        tensors[rng.choice(["x", "a\0/mean", "mean", f"{name}2"])] = tensors.pop(name)
    elif action == "swap":
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), values.clone()
    else:
        factors = 10.0 ** (torch.rand(values.shape) * rng.choice([1, 4, 16]))
        tensors[name] = (values * factors).to(values.dtype)
    path.write_bytes(safetensors.torch.save(tensors))
    return f"{action} {path.name} {name} at {at}"


def _as(value: float, like: torch.Tensor) -> float | int:
    return (
        value if like.is_floating_point() else int(max(-9, min(99, value if value == value else 9)))
    )


def _file(directory: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(directory.iterdir()))
    action = rng.choice(["remove", "fifo", "directory", "device", "swap", "long", "empty"])
    data = path.read_bytes()
    if action == "swap":
        other = rng.choice(sorted(directory.iterdir()))
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif action in ("long", "empty"):
        path.write_bytes(data + b" " * 3_000_000 if action == "long" else b"")
    else:
        path.unlink()
    if action == "fifo":
        os.mkfifo(path)
    elif action == "directory":
        path.mkdir()
    elif action == "device":
        path.symlink_to("/dev/zero")
    return f"{action} {path.name}"


def outcome(directory: Path) -> str:
    """``refused`` or ``accepted``; an error where a promise is broken."""
    try:
        index = read_index(directory)
    except LowbitError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 2000, f"not a line: {message!r}"
        return "refused"
    for layer, records in index.layers.items():
        for name in records:
            planned = index.recipe[layer, name] if index.recipe else Assignment("rotated-hybrid")
            own = index.manifest["codec"]
            for assignment in (
                planned,
                Assignment(own["name"], own["bits"]),
                *(Assignment(each) for each in ("shaped-hybrid", "scaled-hybrid", "static-hybrid")),
            ):
                _check_codec(index, layer, name, assignment)
    if index.recipe:
        _check_plan(index.options())
    return "accepted"


def _check_plan(options: Options) -> None:
    """Whatever options cost, a plan is within its budget, or refused."""
    following = dict(itertools.pairwise(options))
    try:
        recipe = plan(options, 4.2, following=following)
    except LowbitError:
        return
    assert average_bits(options, recipe) <= 4.2 + 1e-6
    assert math.isfinite(predicted_divergence(options, recipe, following))


def _check_codec(index: CalibrationIndex, layer: int, name: str, assignment: Assignment) -> None:
    codec, record = assignment.make(), index.record(layer, name)
    tables = index.tables(
        layer, name, codec, ranks=index.tp_size, bf16_features=assignment.bf16_features
    )
    _check_finite(tables)
    bits = 8 * codec.row_bytes(tables) / index.hidden
    kept = tables.bf16_index.numel() if codec.takes_index else 0
    assert bits <= codec.bits + 16 * (kept + 1.5) / index.hidden, f"{bits} bits of {assignment}"
    data = _ordinary(record)
    payloads = [codec.encode(row, tables, rank=rank) for rank, row in enumerate(data)]
    noise = codec.decode_sum(torch.stack(payloads), tables).double() - data.double().sum(dim=0)
    energy = data.double().square().sum().item()
    sqnr = 10 * math.log10(energy / max(noise.square().sum().item(), 1e-300)) if energy else 0.0
    floor = _STATIC if codec.name == "static-hybrid" else _NOMINAL.get(codec.bits, 20) - _BEHIND
    if energy and codec.name.endswith("-hybrid") and codec.bits:  # 0 bits promise nothing here
        assert sqnr >= floor, (
            f"{codec} at layer {layer} {name}: {sqnr:.1f} dB, promised {floor:.1f}"
        )


def _check_finite(tables: Tables) -> None:
    for key, value in vars(tables).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert bool(value.isfinite().all()), f"{key} of {tables.codec} is not finite"
    if tables.of_sum is not None:
        _check_finite(tables.of_sum)


@cache
def _normal(ranks: int, hidden: int) -> torch.Tensor:
    return torch.randn(ranks, 48, hidden, generator=torch.Generator().manual_seed(1))


def _ordinary(record: SyncPointRecord) -> torch.Tensor:
    """fp32 ``[ranks, tokens, hidden]`` of the record's means and energy, all features alike."""
    ranks, hidden = record.mean.shape
    variance = (record.second_moment - record.mean.square()).clamp_min(0)
    return (
        record.mean[:, None] + _normal(ranks, hidden) * variance.mean(dim=1).sqrt()[:, None, None]
    )


def run(base: Path, directory: Path, seed: int) -> tuple[str, str]:
    """What was done with a copy of the index in `base`, and its outcome."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(base, directory)
    what = mutate(directory, seed)
    try:
        return what, outcome(directory)
    except Exception as error:
        error.add_note(f"seed {seed}: {what}")
        raise
