"""Accounting for people and scripts: `handle.stats()` and `--lowbit-stats FILE`.

    {"sync_points": [{"layer": 1, "name": "mlp.linear_fc2", "codec": "rotated-hybrid (4 bits)",
                      "bits_per_value": 4.14,
                      "choices": [{"collective": "two-shot", "why": "fixed", "calls": 8,
                                   "tokens": 523, "values": ..., "payload_bytes": ...,
                                   "sent_bytes": ..., "seconds": ...}]}, ...],
     "all_gathers": [...],      likewise, with --lowbit-all-gather
     "experts": [...],          likewise, with --lowbit-experts
     "total": [...]}            choices of all together

Numbers are this rank's. Sent bytes are what the payloads really took; for native, which does not
tell, those of a ring. Seconds are wall time on a CPU, waiting for other ranks included, and time on
the stream on a GPU. A call inside a CUDA graph counts once, when it is captured, without seconds,
and its "why" says so.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_lowbit.codecs import Codec
from megatron_lowbit.comm.traffic import Counters, Decision, Traffic
from megatron_lowbit.files import write_atomic


class Counted(NamedTuple):
    """A module that communicates in low bits, and its traffic."""

    layer: int
    name: str
    codec: Codec
    traffic: Traffic


def stats(by_kind: Mapping[str, Sequence]) -> dict:
    """The counters of all modules by kind, each with what `Counted` has, and of all together."""
    together: dict[Decision, Counters] = {}
    content: dict[str, Any] = {}
    for kind, modules in by_kind.items():
        content[kind] = [_entry(one) for one in modules]
        for one in modules:
            for decision, counters in one.traffic.by_decision.items():
                together.setdefault(decision, Counters()).add(counters)
    return {**content, "total": _decisions(together)}


def write_stats(content: dict, path: Path) -> None:
    """Write what `stats` gave to `path`, whole or not at all."""
    write_atomic(path, json.dumps(content, indent=1).encode() + b"\n")


def _entry(one: Counted) -> dict:
    bits = one.traffic.total().bits_per_value
    return {
        "layer": one.layer,
        "name": one.name,
        "codec": repr(one.codec),
        "bits_per_value": None if math.isnan(bits) else bits,
        "choices": _decisions(one.traffic.by_decision),
    }


def _decisions(by_decision: dict[Decision, Counters]) -> list[dict]:
    return [
        {"collective": decision.collective, "why": decision.why, **vars(counters)}
        for decision, counters in by_decision.items()
    ]
