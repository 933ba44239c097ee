"""The results of `benchmark.quality.robustness`, as JSON.

    {"format": 1, "model": NAME, "tp_size": 3, "seq_length": 128, "budget": 4.2, "versions": {...},
     "texts": [{"name": "prose", "sha256", "tokens", "seq_length", "native": {"perplexity"}}, ...],
     "calibrations": [{"kind": "prose", "sequences": 128, "seed": 1, "same_features": 1.0,
                       "results": {TEXT: {CODEC: {"perplexity", "delta_nll", "delta_nll_stderr",
                                                  "kl", "kl_stderr", "top1"}, ...}, ...}}, ...]}

``delta_nll`` and ``kl`` are nats a token, as in `evaluation.output`. ``same_features`` is the share
of the first calibration's BF16 features of rotated-hybrid that this one chose, too; null if there
are none.
"""

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from megatron_lowbit.benchmark.quality.robustness_plan import (
    BUDGET,
    CODECS,
    SEQ_LENGTH,
    Calibration,
)
from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.codecs import get_codec


def to_json(
    options: argparse.Namespace,
    indexes: dict[Calibration, CalibrationIndex],
    summaries: dict[str, dict],
) -> dict:
    """The JSON output; `summaries` has what each text's measure made of all variants."""
    first = next(iter(indexes.values()))
    by_variant = {
        (text, result["variant"]): {key: value for key, value in result.items() if key != "variant"}
        for text, summary in summaries.items()
        for result in summary["results"]
    }
    rows = [
        {
            **asdict(calibration),
            "same_features": _share(_features(first), _features(index)),
            "results": {
                text: {codec: by_variant[text, calibration.variant(codec)] for codec in CODECS}
                for text in summaries
            },
        }
        for calibration, index in indexes.items()
    ]
    texts = [
        {key: value for key, value in summary.items() if key != "results"}
        for summary in summaries.values()
    ]
    return {
        "format": 1,
        "model": options.name or Path(options.load).name,
        "tp_size": options.simulate_tp,
        "seq_length": SEQ_LENGTH,
        "budget": BUDGET,
        "versions": first.manifest["versions"],
        "texts": texts,
        "calibrations": rows,
    }


def _features(index: CalibrationIndex) -> Iterable[set[int]]:
    """rotated-hybrid's BF16 features, by sync point."""
    codec = get_codec("rotated-hybrid")
    for layer, records in index.layers.items():
        for name in records:
            yield set(index.bf16_index(layer, name, codec).tolist())


def _share(first: Iterable[set[int]], other: Iterable[set[int]]) -> float | None:
    """How much of the first sets is in the others; None if there is nothing in them."""
    counts = [(len(a & b), len(a)) for a, b in zip(first, other, strict=True)]
    kept, total = map(sum, zip(*counts, strict=True))
    return kept / total if total else None
