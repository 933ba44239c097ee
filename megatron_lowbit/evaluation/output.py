"""The JSON output of an evaluation: it is made and written, and read again.

`evaluation_schema` says what it holds. In format 2 a variant's name was under ``codec``;
`read_summary` reads it, too.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.evaluation_loop import Evaluation
from megatron_lowbit.evaluation.evaluation_schema import FORMAT
from megatron_lowbit.evaluation.measures.measure import Measure
from megatron_lowbit.evaluation.measures.tasks import average
from megatron_lowbit.files import write_atomic
from megatron_lowbit.json_files import read_json

_OLD = 2  # a variant's name was under "codec"


@dataclass(frozen=True)
class Setting:
    """What was evaluated.

    Attributes:
        tp_size: Ranks that a sum is over, simulated or not.
        sync_points: How many there are.
        hidden: Values of a token at a sync point.
        collectives: Variant -> its collective.
    """

    model: str
    tp_size: int
    simulated: bool
    index_sha256: str
    sync_points: int
    hidden: int
    collectives: dict[str, str]

    @property
    def ring_bytes(self) -> float:
        """What a rank sends for a token in BF16 ring all-reduces: 2 (N-1)/N of each tensor."""
        tensor = 2 * self.hidden
        return self.sync_points * 2 * tensor * (self.tp_size - 1) / self.tp_size


def summary(
    setting: Setting, measures: Mapping[str, Sequence[Measure]], evaluation: Evaluation
) -> dict:
    """The content of the output; `measures` are by its keys.

    Of ``sync_points`` there is one at most, of ``long_context`` a long text and the needles in it,
    or none.
    """
    results = {
        key: [evaluation.summaries[measure.name] for measure in group]
        for key, group in measures.items()
    }
    sync_points = results.pop("sync_points") or [{"sequences": 0, "points": []}]
    long_context = results.pop("long_context")
    return {
        "format": FORMAT,
        "model": setting.model,
        "tp_size": setting.tp_size,
        "simulated": setting.simulated,
        "index_sha256": setting.index_sha256,
        "variants": [
            {
                "variant": name,
                "collective": setting.collectives[name],
                "bits_per_value": traffic.bits_per_value,
                "wire_bytes_per_token": traffic.sent_bytes / traffic.tokens,
            }
            for name, traffic in evaluation.traffic.items()
        ],
        "native": {"wire_bytes_per_token": setting.ring_bytes},
        **results,
        "task_average": average(results["tasks"]) if results["tasks"] else None,
        "long_context": [_joined(*long_context)] if long_context else [],
        "sync_points": sync_points[0],
    }


def _joined(text: dict, needles: dict) -> dict:
    """One entry of ``long_context`` of what was measured on a long text and on needles in it."""
    pairs = zip(text["results"], needles["results"], strict=True)
    results = [{**one, **found} for one, found in pairs]
    native = {**text["native"], **needles["native"]}
    return {**needles, **text, "native": native, "results": results}


def write_summary(content: dict, path: Path) -> None:
    """Write what `summary` gave, whole or not at all."""
    write_atomic(path, json.dumps(_finite(content), indent=2).encode() + b"\n")


def read_summary(path: Path) -> dict:
    """Read an evaluation; one of the format before becomes one of this.

    Raises:
        LowbitError: It cannot be read, is no JSON, or of another format; the message names it.
    """
    content = read_json(path, constant=lambda name: None)
    found = content.get("format") if isinstance(content, dict) else None
    if type(found) is int and found == _OLD:
        return {**_renamed(content), "format": FORMAT}
    if type(found) is not int or found != FORMAT:
        raise LowbitError(
            f"{path}: format is {json.dumps(found)[:60]}, this release reads {_OLD} and {FORMAT}: "
            "write the file again with python -m megatron_lowbit evaluate"
        )
    return content


def _renamed(value):
    """With the key ``variant`` for ``codec``."""
    if isinstance(value, dict):
        return {"variant" if k == "codec" else k: _renamed(one) for k, one in value.items()}
    return [_renamed(one) for one in value] if isinstance(value, list) else value


def _finite(value):
    """`value` with null for what is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
