"""Processes of tests: Python run as a command, what lives, and waiting for it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")


def python(
    *command: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with what can be imported here; `environment` is added to this process's."""
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    env = {**os.environ, "PYTHONPATH": search, **environment}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=1800)


def printed(code: str, *arguments: object, **environment: str) -> str:
    """What code prints that has to end well, in a process of its own."""
    done = python("-c", code, *arguments, PYTHONWARNINGS="ignore", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def is_alive(process: int) -> bool:
    """Whether there is such a process; one that ended and waits for its parent is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], T], seconds: float = 30) -> T:
    """What `condition` gives, once that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
    return found
