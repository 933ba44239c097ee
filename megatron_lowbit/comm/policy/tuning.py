"""The tuning file: times of collectives that were taken on a machine, for `auto` there.

    {"format_version": 2,
     "machine": {"device": "NVIDIA L40S", "backend": "nccl"}, "ranks": 4, "node_size": 4,
     "link": "as it is",
     "times": [{"codec": "shaped-hybrid (4 bits)", "carries": true, "collective": "two-shot",
                "points": [[8192, [0.41, 0.43, 0.40]], ...]}, ...]}

A point is the message's size in bytes of BF16 and the milliseconds of each round
(`comm.policy.timings`). Native has no codec and carries nothing. Format 1 had a median alone, which
does not say what is surely faster.
"""

import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lowbit.comm.policy.timings import Case, Timings
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import write_atomic
from megatron_lowbit.json_files import read_json, shown

FORMAT_VERSION = 2
_REMEDY = (
    "make it with python -m megatron_lowbit doctor --load CKPT, or with "
    "python -m megatron_lowbit bench-all-reduce --write-tuning, on this machine"
)


@dataclass(frozen=True)
class Tuning:
    """A tuning file in memory.

    Attributes:
        machine: Device and backend that it was measured on.
        ranks: Of the group.
        node_size: Ranks in a node that hierarchical was measured with, or None.
        link: What the ranks were joined by, in the words of the benchmark.
        timings: Of every collective.
        origin: Where it was read from, for messages.
    """

    machine: dict[str, str]
    ranks: int
    node_size: int | None
    link: str
    timings: Timings
    origin: str = "tuning file"

    def codecs(self) -> list[str]:
        """The codecs that were measured, and whether with carries."""
        return sorted({str(case) for case in self.timings.times if case.codec})


def this_machine(group: dist.ProcessGroup | None = None) -> dict[str, str]:
    """What a tuning file must have been measured on to serve here."""
    backend = str(dist.get_backend(group))
    if "nccl" in backend and torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "backend": backend}
    return {"device": f"{cpu_name()}, {torch.get_num_threads()} threads", "backend": backend}


def write_tuning(tuning: Tuning, path: Path) -> None:
    """Write `tuning` to `path`, whole or not at all."""
    content = {
        "format_version": FORMAT_VERSION,
        "machine": tuning.machine,
        "ranks": tuning.ranks,
        "node_size": tuning.node_size,
        "link": tuning.link,
        "times": [
            {**case._asdict(), "points": sorted(points.items())}
            for case, points in sorted(tuning.timings.times.items())
        ],
    }
    write_atomic(path, json.dumps(content, indent=1).encode() + b"\n")


def read_tuning(path: Path, *, group: dist.ProcessGroup | None = None) -> Tuning:
    """Read a tuning file and check that it is for this machine and number of ranks.

    Raises:
        LowbitError: It is missing, damaged, of another format, machine, backend or group size; the
            message names the file and the remedy.
    """
    tuning = _parse(path)
    machine, ranks = this_machine(group), dist.get_world_size(group)
    if tuning.ranks != ranks:
        raise LowbitError(f"{path} is for {tuning.ranks} ranks, the group has {ranks}: {_REMEDY}")
    for key, here in machine.items():
        there = tuning.machine.get(key)
        if there != here:
            raise LowbitError(f"{path} is for {key} {there!r}, this is {here!r}: {_REMEDY}")
    return tuning


def _parse(path: Path) -> Tuning:
    from megatron_lowbit.comm.policy.tuning_schema import TuningFile
    from megatron_lowbit.schema import validated

    content = read_json(Path(path), remedy=_REMEDY)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version == 1 and type(version) is int:
        raise LowbitError(
            f"{path} is a tuning file of format 1, which has neither the scatter of its times nor "
            f"carries: {_REMEDY}"
        )
    if type(version) is not int or version != FORMAT_VERSION:
        raise LowbitError(
            f"{path} is not a tuning file of format {FORMAT_VERSION} (found {shown(version)}): "
            f"{_REMEDY}"
        )
    found = validated(TuningFile, content, f"{path} is damaged", remedy=_REMEDY)
    return Tuning(
        machine=found.machine,
        ranks=found.ranks,
        node_size=found.node_size,
        link=found.link,
        timings=Timings(
            {
                Case(entry.codec, entry.carries, entry.collective): dict(sorted(entry.points))
                for entry in found.times
            }
        ),
        origin=str(path),
    )


def cpu_name() -> str:
    """The processor's name: Linux says it in /proc/cpuinfo only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
