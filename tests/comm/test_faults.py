"""A rank that dies in mid-collective ends the others with an error, within the group's timeout."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_lowbit.comm import all_reduce

TIMEOUT = 15


def _work(rank: int, directory: str, collective: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(directory, "store"), 3)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=TIMEOUT)
    )
    x = torch.randn(64, 96)
    all_reduce(x, collective=collective)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    start, message = time.monotonic(), "no error"
    try:
        while time.monotonic() - start < 2 * TIMEOUT:
            all_reduce(x, collective=collective)
    except RuntimeError as error:
        message = f"{time.monotonic() - start:.1f} {error}"
    Path(directory, f"rank{rank}").write_text(message)
    os._exit(0)  # no goodbye to a rank that is gone


@pytest.mark.slow
@pytest.mark.parametrize("collective", ["one-shot", "two-shot"])
def test_a_dead_rank_ends_the_others(collective, tmp_path):
    context = mp.get_context("spawn")
    ranks = [
        context.Process(target=_work, args=(rank, str(tmp_path), collective)) for rank in range(3)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=6 * TIMEOUT)
    assert [process.exitcode for process in ranks] == [0, 0, -signal.SIGKILL]
    for rank in (0, 1):
        seconds, _, message = (tmp_path / f"rank{rank}").read_text().partition(" ")
        assert message != "error", "ended without an error"
        assert float(seconds) < TIMEOUT + 5, message
