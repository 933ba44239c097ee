"""The tuning file: times of every collective that tools/bench_all_reduce.py measured on a machine.

    {"format_version": 1,
     "machine": {"device": "NVIDIA L40S", "backend": "nccl"}, "ranks": 4, "node_size": 4,
     "link": "as it is",
     "times": [{"codec": "rotated-hybrid (4 bits)", "collective": "two-shot",
                "points": [[8192, 0.41], ...]}, ...]}

A point is the message's size in bytes of BF16 and the median milliseconds. Between two sizes the
time is interpolated on logarithmic scales; below the smallest it is the smallest's, and above the
largest it grows with the size.
"""

import bisect
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import write_atomic
from megatron_lowbit.json_files import read_json, shown

FORMAT_VERSION = 1
_REMEDY = "make it with python -m megatron_lowbit bench-all-reduce --write-tuning on this machine"

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Tuning:
    """A tuning file in memory.

    Attributes:
        machine: Device and backend that it was measured on.
        ranks: Of the group.
        node_size: Ranks in a node that hierarchical was measured with, or None.
        link: What the ranks were joined by, in the words of the benchmark.
        times: (codec as its repr, collective) -> points; for ``native`` the codec is "".
        origin: Where it was read from, for messages.
    """

    machine: dict[str, str]
    ranks: int
    node_size: int | None
    link: str
    times: dict[tuple[str, str], Points]
    origin: str = "tuning file"

    def seconds(self, codec: str, collective: str, message_bytes: int) -> float | None:
        """Seconds of a message of so many bytes of BF16, or None if that was not measured."""
        points = self.times.get((codec, collective))
        return None if points is None else interpolate(points, message_bytes) / 1000

    def codecs(self) -> list[str]:
        """The codecs that were measured."""
        return sorted({codec for codec, _ in self.times if codec})


def interpolate(points: Points, size: int) -> float:
    """The value at `size`, from ``(size, value)`` in ascending order of size; see the module."""
    sizes = [point[0] for point in points]
    if size <= sizes[0]:
        return points[0][1]
    if size >= sizes[-1]:
        return points[-1][1] * size / sizes[-1]
    above = bisect.bisect_left(sizes, size)
    (x0, y0), (x1, y1) = points[above - 1], points[above]
    share = math.log(size / x0) / math.log(x1 / x0)
    return math.exp(math.log(y0) + share * math.log(y1 / y0))


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
            {"codec": codec, "collective": collective, "points": points}
            for (codec, collective), points in sorted(tuning.times.items())
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
        times={(entry.codec, entry.collective): sorted(entry.points) for entry in found.times},
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
