"""What the machine is that the check runs on: the stage before the others."""

import os
import platform
import subprocess

from megatron_lowbit.benchmark.gpu_check.stage_tasks import Rows, Task
from megatron_lowbit.errors import LowbitError


def run(task: Task) -> Rows:
    """One row: device, driver, versions.

    Raises:
        LowbitError: There is no torch, no GPU or no Triton, or Triton's kernels do not run.
    """
    try:
        import torch
        import triton
    except ImportError as error:
        raise LowbitError(f"{error}: pip install torch triton safetensors") from None
    from megatron_lowbit import kernels

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"triton": triton.__version__, "cores": os.cpu_count() or 0}
    if task.is_rehearsal:
        yield {"device": "a CPU, by Triton's interpreter", "driver": "none", **versions}
        return
    if not torch.cuda.is_available():
        raise LowbitError("torch sees no GPU: see nvidia-smi, or pass --rehearse")
    described = kernels.describe("cuda")
    if described.startswith("none: "):
        raise LowbitError(f"Triton's kernels do not run ({described.removeprefix('none: ')})")
    properties = torch.cuda.get_device_properties(0)
    yield {
        "device": properties.name,
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        **versions,
    }


def _driver() -> str:
    """Its version, as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "unknown"
