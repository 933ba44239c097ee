"""Compiles the kernels of `peer_cases` for each rank, without ranks: before they wait for peers.

What the compiler sees differs from rank to rank. The stage of the ranks, each of which compiles
alone, would have no time for so many.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron_lowbit.benchmark.gpu_check.work import peer_cases
from megatron_lowbit.benchmark.gpu_check.work.attempts import Case
from megatron_lowbit.comm.symmetric_memory import BLOCK_BYTES
from megatron_lowbit.kernels.peer_memory import PROGRAMS, PeerMemory


class _Compiled(Exception):
    """Raised in place of the launch."""


def compilations(numbers_of_ranks: tuple[int, ...], device: str) -> list[Case]:
    """A case for each kernel of each rank."""
    found: list[Case] = []
    for ranks in numbers_of_ranks:
        for rank in range(ranks):
            memory = partial(alone, rank, ranks, device)
            for name, check in peer_cases.checks(graphs=True):
                title = f"rank {rank} of {ranks}, compiled: {name}"
                found.append((title, partial(compiled, check, memory)))
    return found


def alone(rank: int, ranks: int, device: str) -> PeerMemory:
    """Memory as a rank sees it, whose peers are nowhere: nothing may be launched on it."""
    return PeerMemory(
        peers=torch.zeros(ranks, dtype=torch.int64, device=device),
        calls=torch.zeros(PROGRAMS, dtype=torch.int32, device=device),
        late=torch.zeros(1, dtype=torch.int32, device=device),
        rank=rank,
        size=BLOCK_BYTES,
        seconds=peer_cases.SECONDS,
    )


def compiled(check: Callable[[PeerMemory], None], memory: Callable[[], PeerMemory]) -> None:
    """Do `check` up to its launch, and compile the kernel in its place."""
    from megatron_lowbit.kernels.triton import symmetric

    plain = symmetric.launch
    symmetric.launch = _compile
    try:
        check(memory())
    except _Compiled:
        pass
    finally:
        symmetric.launch = plain


def _compile(kernel: Any, programs: int, tile, on, *arguments, **constants) -> None:
    """As `launching.launch`."""
    if not programs:
        return
    options = {"LOG_TILE": tile.log_tile, "num_warps": tile.warps, "enable_fp_fusion": False}
    with torch.cuda.device_of(on):
        kernel.warmup(*arguments, **constants, **options, grid=(programs,))
    raise _Compiled
