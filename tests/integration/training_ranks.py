"""For tests in ranks that start `megatron.training` as tools do: group by group, each its own."""

import argparse
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
from on_ranks import directory_of_all

from megatron_lowbit.integration.runtime import session

try:
    # Only looked for: importing it takes seconds and is for the ranks.
    HAVE_MEGATRON = importlib.util.find_spec("megatron.training") is not None
except ModuleNotFoundError:
    HAVE_MEGATRON = False
if not HAVE_MEGATRON:
    pytest.skip("megatron.training is not installed", allow_module_level=True)


def made_by_one(name: str, make: Callable[[Path], None]) -> Path:
    """A directory that rank 0 fills, for all, as a process that is no rank: it can convert.

    The group of these ranks has ended then.
    """
    directory = directory_of_all(name)
    store, *_ = next(dist.rendezvous("env://"))
    dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", "1")
            make(directory)
        store.set(name, "made")
    store.wait([name])
    return directory


@contextmanager
def started(args: argparse.Namespace) -> Iterator[None]:
    """The ranks are a group, and Megatron is started, for as long as this lasts."""
    session.initialize(args)
    try:
        yield
    finally:
        session.shutdown()
