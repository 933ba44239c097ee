"""Runs the stages, each in processes of its own with a time limit.

A stage that raises, crashes, hangs or breaks the GPU's context leaves the others alive, and what it
had found. The results are written whole after every stage, and once a second within one; until a
stage has ended it counts as out of time, so that the file is right whenever this process ends.
Nothing here imports torch.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lowbit.benchmark.gpu_check.gpu_results import (
    FAILED,
    OUT_OF_TIME,
    PASSED,
    SKIPPED,
    Content,
    write,
)
from megatron_lowbit.benchmark.gpu_check.gpu_stages import (
    AS_MANY_AS_CORES,
    MACHINE,
    MOST_PROCESSES,
    Stage,
)
from megatron_lowbit.benchmark.gpu_check.stage_tasks import Row, Task
from megatron_lowbit.files import import_path

_PROCESS = "megatron_lowbit.benchmark.gpu_check.stage_process"
_TICK, _WRITTEN = 0.05, 1.0  # seconds: between looks at the processes, and between writings
_STUCK = 2.0  # seconds that a killed process may take to end
# What a user's shell may say of kernels, ranks and Triton: the check says it itself.
_UNSET = ("MEGATRON_LOWBIT_KERNELS", "MEGATRON_LOWBIT_ROTATION", "TRITON_INTERPRET", "RANK")
LOG = "gpu_check.log"
_LAST = 200  # characters of the last words of a process


@dataclass(frozen=True)
class Setting:
    """What all stages have in common; `output` is the folder of the results (see `Task`)."""

    output: Path
    device: str
    partials: Path


@dataclass
class _Part:
    process: subprocess.Popen
    rows: Path
    log: Path
    was_stopped: bool = False  # and did not end by itself

    def found(self) -> list[Row]:
        """The rows so far; a line that is cut off is none."""
        lines = self.rows.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:_LAST]

    def kill(self) -> None:
        """This process and those that it started, which are a group."""
        self.was_stopped = self.process.poll() is None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self) -> None:
        """For its end, but not for ever: it may be stuck in a driver."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STUCK)


def run(
    content: Content,
    stages: Sequence[Stage],
    setting: Setting,
    *,
    seconds: float,
    say: Callable[[str], None],
    machine: Stage = MACHINE,
) -> None:
    """Run `stages` and keep their results in `content`, in ``gpu_check.json`` at every moment.

    All together have `seconds`; `say` takes a line for each. The stage `machine` describes the
    machine; where it fails all others are skipped.
    """
    deadline = time.monotonic() + seconds
    write(content, setting.output)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as scratch:
        work = _Work(content, setting, Path(scratch))
        entry = work.run(machine, 0.5 * seconds, {})
        content["machine"] = {k: v for row in entry["results"] for k, v in row.items()}
        for place, stage in enumerate(stages):
            mine = content["stages"][stage.name]
            if entry["status"] != PASSED:
                reason = entry["reason"]
                mine |= {"status": SKIPPED, "reason": f"the machine does not serve: {reason}"}
            elif (left := deadline - time.monotonic()) > 0:
                rest = sum(one.weight for one in stages[place:])
                work.run(stage, left * stage.weight / rest, mine)
            write(content, setting.output)
            reason = f": {mine['reason']}" if mine["reason"] else ""
            results = len(mine["results"])
            say(f"{stage.name}: {mine['status']}{reason} ({results} results, {mine['seconds']} s)")


class _Work:
    """Where stages run: their scratch folder and their log."""

    def __init__(self, content: Content, setting: Setting, scratch: Path):
        self._content, self._setting, self._scratch = content, setting, scratch

    def run(self, stage: Stage, limit: float, entry: dict) -> dict:
        """Run one stage within `limit` seconds; `entry` becomes its results."""
        began = time.monotonic()
        entry |= {"status": OUT_OF_TIME, "reason": "the check was stopped in it", "results": []}
        entry |= {"limit_s": round(limit, 1), "seconds": 0.0}
        count = stage.processes
        if count == AS_MANY_AS_CORES:
            count = min(os.cpu_count() or 1, MOST_PROCESSES)
        parts: list[_Part] = []
        try:
            for part in range(count):
                parts.append(self._start(stage, part, count))
            self._watch(parts, began + limit, entry)
        finally:
            for part_of in parts:
                part_of.kill()
            for part_of in parts:
                part_of.wait()
            self._keep_log(stage, parts)
        rows = [part_of.found() for part_of in parts]
        entry["results"] = _results(rows)
        entry["seconds"] = round(time.monotonic() - began, 1)
        entry["status"], entry["reason"] = _verdict(parts, rows, limit)
        return entry

    def _start(self, stage: Stage, part: int, parts: int) -> _Part:
        directory = self._scratch / stage.name
        directory.mkdir(exist_ok=True)
        rows = self._scratch / f"{stage.name}.{part}"
        log = rows.with_name(f"{rows.name}.log")
        rows.touch()
        setting = self._setting
        task = Task(part, parts, str(directory), setting.device, str(setting.partials))
        argv = [sys.executable, "-m", _PROCESS, stage.module, stage.function]
        argv += [str(rows), json.dumps(asdict(task))]
        with log.open("wb") as out:
            process = subprocess.Popen(
                argv,
                env=self._environment(parts),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return _Part(process, rows, log)

    def _environment(self, parts: int) -> dict[str, str]:
        """Of a process, one of `parts`."""
        env = {k: v for k, v in os.environ.items() if k not in _UNSET}
        env |= {"PYTHONPATH": import_path(), "TRITON_CACHE_DIR": str(self._scratch / "triton")}
        env |= {"TRITON_INTERPRET": "1"} if self._setting.device == "cpu" else {}
        return env | ({"OMP_NUM_THREADS": "1"} if parts > 1 else {})

    def _watch(self, parts: list[_Part], until: float, entry: dict) -> None:
        """Wait for the processes, and keep what they have found so far."""
        written = time.monotonic()
        while any(part.process.poll() is None for part in parts):
            now = time.monotonic()
            if now > until:
                return
            if now - written > _WRITTEN:
                entry["results"] = _results([part.found() for part in parts])
                write(self._content, self._setting.output)
                written = now
            time.sleep(_TICK)

    def _keep_log(self, stage: Stage, parts: list[_Part]) -> None:
        """Append what the processes have printed to the log beside the results."""
        with (self._setting.output / LOG).open("ab") as file:
            for number, part in enumerate(parts):
                file.write(f"-- {stage.name}, process {number}\n".encode() + part.log.read_bytes())


def _results(rows: list[list[Row]]) -> list[Row]:
    """All rows but those that say how a process ended."""
    return [row for part in rows for row in part if not _ending(row)]


def _ending(row: Row) -> bool:
    return "ended" in row or "skipped" in row or ("error" in row and "case" not in row)


def _verdict(parts: list[_Part], rows: list[list[Row]], limit: float) -> tuple[str, str]:
    """The status of a stage and its reason."""
    errors = [_error(row) for part in rows for row in part if "error" in row]
    skipped = [row["skipped"] for part in rows for row in part if "skipped" in row]
    for number, (part, mine) in enumerate(zip(parts, rows, strict=True)):
        code, is_whole = part.process.returncode, bool(mine) and _ending(mine[-1])
        if is_whole or part.was_stopped or code is None:
            continue
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        errors.append(f"process {number} {how}: {part.last_words() or 'it said nothing'}")
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        return FAILED, errors[0] + more
    if not all(mine and _ending(mine[-1]) for mine in rows):
        return OUT_OF_TIME, f"it did not end within {limit:.0f} s"
    return (SKIPPED, skipped[0]) if skipped else (PASSED, "")


def _error(row: Row) -> str:
    return f"{row['case']}: {row['error']}" if "case" in row else row["error"]
