"""A rank that dies in mid-collective ends the others with an error, within the group's timeout."""

import os
import signal
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_lowbit.codecs import get_codec
from megatron_lowbit.comm import all_reduce
from megatron_lowbit.comm.policy.making import make_policy
from megatron_lowbit.comm.policy.policy import Settings

TIMEOUT = 15


def _work(rank: int, directory: str, collective: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(directory, "store"), 3)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=TIMEOUT)
    )
    x = torch.randn(64, 96)
    call = partial(all_reduce, x, collective=collective)
    if collective == "auto":
        call = _timing
    else:
        call()
    if rank == 2:
        if collective != "auto":
            _die()
        threading.Timer(0.3, _die).start()  # while collectives are timed
    start, message = time.monotonic(), "no error"
    try:
        while time.monotonic() - start < 2 * TIMEOUT:
            call()
    except RuntimeError as error:
        message = f"{time.monotonic() - start:.1f} {error}"
    Path(directory, f"rank{rank}").write_text(message)
    os._exit(0)  # no goodbye to a rank that is gone


def _timing() -> None:
    """What `auto` does when a model is loaded: many collectives, and agreement between them."""
    codec = get_codec()
    place = {"group": dist.group.WORLD, "device": torch.device("cpu")}
    make_policy(Settings(), codec=codec, tables=codec.tables(96), **place)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("collective", ["one-shot", "two-shot", "auto"])
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
