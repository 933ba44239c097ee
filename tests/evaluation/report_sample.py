"""Made-up files for tests of the report: seeded and of the right shape, but measured by nobody."""

import json
import math
import random
from pathlib import Path

import torch
from json_places import changed

from megatron_lowbit.calibration.index import CalibrationIndex, SyncPointRecord, select_bf16_index

# codec, collective, bits a value, KL, SQNR in dB: of a plausible size, so that plots look alike.
VARIANTS = (
    ("bf16", "one-shot", 16.0, 0.0014, 52.0),
    ("int4", "one-shot", 4.0, 0.41, 11.5),
    ("int4-random", "one-shot", 4.19, 0.40, 11.6),
    ("static-hybrid", "one-shot", 4.19, 0.238, 14.5),
    ("rotated-hybrid", "one-shot", 4.14, 0.0591, 19.8),
    ("rotated-hybrid-6", "one-shot", 6.14, 0.0062, 31.0),
    ("rotated-hybrid-3", "one-shot", 3.14, 0.221, 14.4),
    ("rotated-hybrid-2", "one-shot", 2.14, 0.953, 9.2),
    ("rotated-hybrid-4+4", "two-shot", 4.14, 0.125, 17.0),
    ("rotated-hybrid-4+6", "two-shot", 5.14, 0.064, 19.5),
    ("static-hybrid-4+4", "two-shot", 4.19, 0.484, 11.0),
    ("int4-g32", "one-shot", 4.5, 0.17, 16.1),
    ("mxfp4", "one-shot", 4.25, 0.241, 14.2),
    ("nvfp4", "one-shot", 4.5, 0.079, 18.6),
    ("int8-token", "one-shot", 8.03, 0.0119, 27.0),
    ("fp8-g256", "one-shot", 8.13, 0.0092, 29.5),
)
ALL_CODECS = {variant[0] for variant in VARIANTS}
KINDS = ("self_attention.linear_proj", "mlp.linear_fc2")
TASKS = ("arc-easy", "arc-challenge", "winogrande", "hellaswag", "boolq")


def evaluation(
    *,
    seed: int = 0,
    tp_size: int = 3,
    simulated: bool = False,
    layers: int = 30,
    index_sha256: str = "0" * 64,
) -> dict:
    """All sections of an evaluation file."""
    random_ = random.Random(seed)
    worse = 1 + 0.08 * (tp_size - 3)
    texts = ("persuasion.txt", "kjv.txt")
    return {
        "format": 3,
        "model": "made-up model",
        "tp_size": tp_size,
        "simulated": simulated,
        "index_sha256": index_sha256,
        "variants": [_variant(name, by, bits, tp_size) for name, by, bits, _, _ in VARIANTS],
        "native": {"wire_bytes_per_token": 92160.0},
        "texts": [_text(name, worse * (1 + i), random_) for i, name in enumerate(texts)],
        "tasks": [_task(name, random_) for name in TASKS],
        "task_average": _average(random_),
        "long_context": [_long_context(random_)],
        "generation": [_generation(random_)],
        "sync_points": _sync_points(layers, random_),
    }


def index(layers: int = 30, hidden: int = 128, ranks: int = 3, **manifest) -> CalibrationIndex:
    """An index with a few wide features, wider with the layer; `manifest` adds keys to its own."""
    generator = torch.Generator().manual_seed(0)
    records: dict = {}
    for layer in range(1, layers + 1):
        for kind in KINDS:
            wide = torch.rand(ranks, hidden, generator=generator) * (1 + layer / 10) + 0.1
            wide[:, :3] *= torch.tensor([40.0, 9.0, 4.0])
            record = SyncPointRecord(
                bf16_index=select_bf16_index(2 * wide, 2),
                minimum=-wide,
                maximum=wide,
                mean=0 * wide,
                second_moment=wide**2,
                sum_minimum=-wide[0],
                sum_maximum=2 * wide[1],
                sum_mean=0 * wide[0],
                sum_second_moment=wide[0] ** 2,
                divergence=torch.zeros(1, dtype=torch.float64) if "recipe" in manifest else None,
            )
            records.setdefault(layer, {})[kind] = record
    own = {
        "model": {"num_layers": layers, "hidden_size": hidden, "fingerprints": {"1": "secret"}},
        "tp_size": ranks,
        "codec": {"name": "rotated-hybrid", "bits": 4, "bf16_features": 2},
        "corpus": {"files": ["emma.txt"], "sha256": "2" * 64},
        "versions": {"torch": "2.13.0"},
    }
    return CalibrationIndex(manifest=own | manifest, layers=records)


def keep_codecs(content, names: set[str]):
    """The same evaluation with fewer codecs."""
    if isinstance(content, list):
        kept = [one for one in content if not isinstance(one, dict) or _is_in(one, names)]
        return [keep_codecs(one, names) for one in kept]
    if isinstance(content, dict):
        own = (k for k in content if k in names or k not in ALL_CODECS)
        return {key: keep_codecs(content[key], names) for key in own}
    return content


def without_numbers(content):
    """The same evaluation with null for every fraction, as where nothing was finite."""
    return changed(content, value=lambda one: None if isinstance(one, float) else one)


def _is_in(one: dict, names: set[str]) -> bool:
    return one.get("variant") is None or one["variant"] in names


def write(content: dict, path: Path) -> Path:
    """Write an evaluation file."""
    path.write_text(json.dumps(content))
    return path


def _variant(name: str, collective: str, bits: float, ranks: int) -> dict:
    sent = 60 * 576 * bits / 8 * (ranks - 1) * (0.67 if collective == "two-shot" else 1)
    return {
        "variant": name,
        "collective": collective,
        "bits_per_value": bits,
        "wire_bytes_per_token": sent,
    }


def _text(name: str, factor: float, random_: random.Random) -> dict:
    results = []
    for codec, _, _, kl, _ in VARIANTS:
        kl *= factor * random_.uniform(0.95, 1.05)
        loss = 0.8 * kl * random_.uniform(0.8, 1.1) - (0.0012 if codec == "bf16" else 0)
        results.append(
            {
                "variant": codec,
                "perplexity": 46.1 * math.exp(loss),
                "delta_nll": loss,
                "delta_nll_stderr": 0.002 + 0.03 * abs(loss),
                "kl": kl,
                "kl_stderr": 0.02 * kl,
                "top1": 1 - 0.68 * kl**0.5,
            }
        )
    return {
        "name": name,
        "sha256": "1" * 64,
        "tokens": 16384,
        "seq_length": 512,
        "native": {"perplexity": 46.1},
        "results": results,
    }


def _accuracy(base: float, random_: random.Random) -> dict:
    acc, norm = base + random_.gauss(0, 0.01), base + 0.02 + random_.gauss(0, 0.01)
    return {"acc": acc, "acc_stderr": 0.034, "acc_norm": norm, "acc_norm_stderr": 0.035}


def _task(name: str, random_: random.Random) -> dict:
    base = random_.uniform(0.3, 0.6)
    results = []
    for codec, _, _, kl, _ in VARIANTS:
        lost = 0.1 * kl
        results.append(
            {
                "variant": codec,
                **_accuracy(base - lost, random_),
                "kept": 1 - lost / base,
                "difference": -lost,
                "difference_stderr": 0.01,
                "same_choice": 1 - lost,
            }
        )
    native = _accuracy(base, random_)
    return {"name": name, "items": 200, "metric": "acc_norm", "native": native, "results": results}


def _average(random_: random.Random) -> dict:
    results = []
    for codec, _, _, kl, _ in VARIANTS:
        kept = 1 - 0.25 * kl + random_.gauss(0, 0.004)
        width = 0.012 + 0.03 * kl
        results.append(
            {
                "variant": codec,
                "average": 0.43 * kept,
                "average_stderr": 0.011,
                "kept": kept,
                "kept_stderr": width / 2,
                "kept_low": kept - width,
                "kept_high": kept + width,
                "difference": 0.43 * (kept - 1),
                "difference_stderr": 0.43 * width / 2,
            }
        )
    return {"native": 0.43, "native_stderr": 0.011, "results": results}


def _long_context(random_: random.Random) -> dict:
    buckets = [[512 * i, 512 * (i + 1)] for i in range(8)]
    results = []
    for codec, _, _, kl, _ in VARIANTS:
        curve = [kl * (1 + 0.03 * i) * random_.uniform(0.95, 1.05) for i in range(len(buckets))]
        results.append(
            {
                "variant": codec,
                "delta_nll": [0.8 * value for value in curve],
                "delta_nll_stderr": [0.1 * value for value in curve],
                "kl": curve,
                "kl_stderr": [0.1 * value for value in curve],
                **_retrieval(max(0.0, 0.9 - 0.5 * kl)),
                "lost": 1,
                "gained": 0,
                "delta_log_likelihood": -kl,
                "delta_log_likelihood_stderr": 0.1,
            }
        )
    return {
        "name": "persuasion.txt",
        "sha256": "1" * 64,
        "sequences": 2,
        "seq_length": 4096,
        "buckets": buckets,
        "needles": 20,
        "depths": [0.1, 0.9],
        "native": {**_retrieval(0.9), "nll": [3.8] * 8, "nll_stderr": [0.1] * 8},
        "results": results,
    }


def _retrieval(share: float) -> dict:
    return {"retrieved": share, "retrieved_stderr": 0.05, "retrieved_by_depth": [share, share]}


def _generation(random_: random.Random) -> dict:
    results = [
        {
            "variant": codec,
            "mean_agreement": 64 * math.exp(-3 * kl) * random_.uniform(0.9, 1),
            "mean_agreement_stderr": 2.0,
            "median_agreement": 60 * math.exp(-3 * kl),
            "full_agreement": round(16 * math.exp(-8 * kl)) / 16,
            "full_agreement_stderr": 0.1,
        }
        for codec, _, _, kl, _ in VARIANTS
    ]
    return {
        "name": "prompts.txt",
        "sha256": "1" * 64,
        "prompts": 16,
        "prompt_length": 32,
        "new_tokens": 64,
        "results": results,
    }


def _sync_points(layers: int, random_: random.Random) -> dict:
    points = []
    for layer in range(1, layers + 1):
        for kind in KINDS:
            harder = 3 * math.sin(layer / 5) + random_.gauss(0, 0.5)
            sqnr = {codec: db - harder for codec, _, _, _, db in VARIANTS}
            if layer == 2 and kind == "mlp.linear_fc2":  # one that a mean over layers would hide
                sqnr["static-hybrid"] -= 12
            worst = {codec: value - random_.uniform(3, 7) for codec, value in sqnr.items()}
            points.append({"layer": layer, "name": kind, "sqnr": sqnr, "worst_token_sqnr": worst})
    return {"sequences": 4, "points": points}
