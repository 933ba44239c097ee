"""All-reduces over symmetric memory: as many ranks as this stage has processes, on one GPU."""

import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lowbit.benchmark.gpu_check.stage_tasks import Rows, Task
from megatron_lowbit.benchmark.gpu_check.work import peer_cases
from megatron_lowbit.benchmark.gpu_check.work.attempts import attempts
from megatron_lowbit.benchmark.gpu_check.work.interpreted import interpret
from megatron_lowbit.kernels.peer_memory import PeerMemory


def run(task: Task) -> Rows:
    """A row for each call, by each rank; all ranks end with the last one."""
    if os.path.exists("/sys/class/net/lo"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(Path(task.directory) / "store"), task.parts)
    waits = timedelta(seconds=peer_cases.SECONDS)
    ranks = {"rank": task.part, "world_size": task.parts}
    dist.init_process_group("gloo", store=store, timeout=waits, **ranks)
    memory = _memory(task)
    few: dict[str, Any] = {"graphs": False, "calls": 2} if task.is_rehearsal else {"graphs": True}
    found = [(name, partial(check, memory)) for name, check in peer_cases.checks(**few)]
    for row in attempts(found, task.device):
        yield {**row, "case": f"rank {task.part}: {row['case']}"}
    dist.barrier()  # a rank that ended would take its memory along


def _memory(task: Task) -> PeerMemory:
    if not task.is_rehearsal:
        return peer_cases.opened(torch.device("cuda", 0))
    interpret()
    directory = Path(task.directory)
    return peer_cases.mapped(
        task.part, task.parts, directory, programs=2, seconds=peer_cases.SECONDS
    )
