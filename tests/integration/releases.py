"""The megatron-core releases that tools/setup_env.sh installs, and how to run a script on each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDER = "0.16.1"
RELEASES = [OLDER, "0.19.2"]


def environment(release: str) -> dict[str, str]:
    """Environment variables that make `import megatron.core` take `release`, or a skipped test."""
    path = [str(ROOT)]
    if release == OLDER:
        beside = Path(sys.prefix) / f"megatron-core-{OLDER}"
        if not beside.is_dir():
            pytest.skip(f"megatron-core {OLDER} is not in {sys.prefix}: run tests/run.sh")
        path.insert(0, str(beside))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def torchrun(ranks: int, *command: str | Path, env: dict[str, str] | None = None, timeout=300):
    """Run a script under torchrun; stdout and stderr are captured as text."""
    runner = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*runner, "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        + [str(part) for part in command],
        env=env or environment("0.19.2"),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
