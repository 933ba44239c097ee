"""Real process groups for tests: N processes that talk over Gloo."""

import inspect
import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from a process that has imported it: 1.5 s each. Nothing of this project, which
# that process, not knowing pytest's path, would take from where it is installed.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed"])


def on_each_rank(*counts: Any) -> Callable[[Callable], Callable]:
    """Have a test run in every rank of a group, for each number of ranks.

    The test is given its `rank`. Its other fixtures and parameters are made once, in the test's own
    process, and sent: all ranks have the same `tmp_path`. It is the innermost decorator. pytest
    rewrites no asserts in ranks: one that fails shows no values but those of its message.
    """

    def decorate(test: Callable) -> Callable:
        names = [name for name in inspect.signature(test).parameters if name != "rank"]

        def on_ranks(ranks: int, tmp_path: Path, **given: Any) -> None:
            given |= {"ranks": ranks, "tmp_path": tmp_path}
            given = {name: given[name] for name in names}
            run_ranks(ranks, _test, tmp_path / "ranks", test.__module__, test.__name__, given)

        on_ranks.test, on_ranks.__doc__ = test, test.__doc__
        on_ranks.__name__, on_ranks.__module__ = test.__name__, test.__module__
        on_ranks.__signature__ = inspect.Signature(
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in dict.fromkeys(["ranks", "tmp_path", *names])
        )
        return pytest.mark.parametrize("ranks", counts)(on_ranks)

    return decorate


def _test(rank: int, module: str, name: str, given: dict[str, Any]) -> None:
    getattr(import_module(module), name).test(rank, **given)


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
