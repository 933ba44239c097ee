"""Real process groups for tests: N spawned processes that talk over Gloo."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(ranks: int, work: Callable[..., Any], directory: Path, *args: Any) -> list[Any]:
    """Run `work(rank, *args)` in `ranks` processes of one Gloo group; its results by rank.

    `work` must be a module-level function, its result something that torch.save can write.
    """
    directory.mkdir(parents=True, exist_ok=True)
    mp.spawn(_worker, args=(ranks, work, str(directory), args), nprocs=ranks)
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
