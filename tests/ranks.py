"""Real process groups for tests: N processes that talk over Gloo."""

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from a process that has imported it: 1.5 s each. Nothing of this project, which
# that process, not knowing pytest's path, would take from where it is installed.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed"])


def run_ranks(ranks: int, work: Callable[..., Any], directory: Path, *args: Any) -> list[Any]:
    """Run `work(rank, *args)` in `ranks` processes of one Gloo group; its results by rank.

    `work` must be a module-level function, its result something that torch.save can write.
    """
    directory.mkdir(parents=True, exist_ok=True)
    start = {"nprocs": ranks, "start_method": "forkserver"}
    mp.start_processes(_worker, args=(ranks, work, str(directory), args), **start)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def _worker(rank: int, ranks: int, work: Callable[..., Any], directory: str, args: tuple) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(directory, "store"), ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    try:
        result = work(rank, *args)
        torch.save(result, os.path.join(directory, f"rank{rank}.pt"))
    finally:
        dist.destroy_process_group()
