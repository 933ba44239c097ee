"""``gpu_check.json``: what the stages found, written whole, and checked when it is read."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_lowbit.benchmark.gpu_check.gpu_stages import STAGES, Stage
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import commit, sources_digest, write_atomic
from megatron_lowbit.json_files import read_json, shown

NAME = "gpu_check.json"
FORMAT = 1
STATUSES = PASSED, FAILED, SKIPPED, OUT_OF_TIME = ("passed", "failed", "skipped", "out of time")
Content = dict[str, Any]
_TEXTS = ("date", "commit", "sources")
_REMEDY = "make another by tools/gpu_check.sh OUT_DIR"


def new(stages: Sequence[Stage], *, minutes: float, is_rehearsal: bool) -> Content:
    """Results of a check that has not begun: all of its stages are out of time."""
    entry = {"status": OUT_OF_TIME, "reason": "it was not begun", "seconds": 0.0, "limit_s": 0.0}
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "sources": sources_digest(),
        "rehearsal": is_rehearsal,
        "minutes": minutes,
        "machine": {},
        "stages": {stage.name: {**entry, "results": []} for stage in stages},
    }


def write(content: Content, output: Path) -> None:
    """Put `content` in the place of what is in the folder `output`."""
    write_atomic(output / NAME, json.dumps(content, indent=1).encode() + b"\n")


def not_passed(content: Content) -> list[str]:
    """The stages that failed or were out of time, or, where nothing ran, why; none if all is well.

    A stage that is skipped for want of a file is well.
    """
    stages = content["stages"]
    if all(entry["status"] == SKIPPED for entry in stages.values()):
        return [next(entry["reason"] for entry in stages.values())]
    bad = {name: e for name, e in stages.items() if e["status"] in (FAILED, OUT_OF_TIME)}
    return [f"{name} {entry['status']} ({entry['reason']})" for name, entry in bad.items()]


def read(path: Path) -> Content:
    """Results of a check on a GPU.

    Raises:
        LowbitError: There are none, they are damaged, of another format, of a rehearsal, or of a
            machine that does not serve.
    """
    content = read_json(path, remedy=_REMEDY)
    problem = _problem(content)
    if problem:
        raise LowbitError(f"{path} is no result of gpu-check ({problem}): {_REMEDY}")
    if content["rehearsal"]:
        raise LowbitError(f"{path} is of a rehearsal: nothing in it was measured on a GPU")
    if all(entry["status"] == SKIPPED for entry in content["stages"].values()):
        raise LowbitError(f"{path} has no result of any stage: {not_passed(content)[0]}")
    return content


def _problem(content: Any) -> str:
    """What is wrong with the content of a file; empty if nothing is."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        return f"its format is {shown(found)}, not {FORMAT}"
    for key in _TEXTS:
        if not isinstance(content.get(key), str):
            return f"{key} is {shown(content.get(key))}"
    if not isinstance(content.get("rehearsal"), bool) or not _is_machine(content.get("machine")):
        return "it does not say of which machine it is"
    stages = content.get("stages")
    if not isinstance(stages, dict) or set(stages) != {stage.name for stage in STAGES}:
        return "its stages are others"
    return next(filter(None, (_bad_stage(name, one) for name, one in stages.items())), "")


def _is_machine(machine: Any) -> bool:
    return isinstance(machine, dict) and all(isinstance(v, str | int) for v in machine.values())


def _bad_stage(name: str, entry: Any) -> str:
    if not isinstance(entry, dict) or entry.get("status") not in STATUSES:
        return f"stage {name} has no status"
    if not isinstance(entry.get("reason"), str):
        return f"stage {name} has no reason"
    results = entry.get("results")
    if not isinstance(results, list) or not all(isinstance(row, dict) for row in results):
        return f"stage {name} has no results"
    return ""
