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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_lowbit.codecs import Codec
from megatron_lowbit.comm.traffic import Counters, Decision, Traffic
from megatron_lowbit.files import write_atomic


@dataclass(frozen=True)
class Counted:
    """A module that communicates in low bits, and its traffic."""

    layer: int
    name: str
    codec: Codec
    traffic: Traffic


def stats(
    sync_points: Iterable[Counted], all_gathers: Iterable[Counted], experts: Iterable[Counted]
) -> dict:
    """The counters of all modules, and of all together."""
    sync_points, all_gathers, experts = list(sync_points), list(all_gathers), list(experts)
    together: dict[Decision, Counters] = {}
    for one in (*sync_points, *all_gathers, *experts):
        for decision, counters in one.traffic.by_decision.items():
            together.setdefault(decision, Counters()).add(counters)
    return {
        "sync_points": [_entry(one) for one in sync_points],
        "all_gathers": [_entry(one) for one in all_gathers],
        "experts": [_entry(one) for one in experts],
        "total": _decisions(together),
    }


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
