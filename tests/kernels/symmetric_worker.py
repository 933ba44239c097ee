"""What a rank does in the tests of the symmetric-memory kernels in Triton's interpreter.

Ranks are processes, and the memory that all can write is files that all of them map: the rows, the
flags and the atomics are real, only the GPUs are not.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from cases import sample
from torch import Tensor

from megatron_lowbit.benchmark.gpu_check.work import peer_cases
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import interpret, tables_of
from megatron_lowbit.benchmark.gpu_check.work.peer_cases import (
    CALLS,
    MAPPED_BYTES,
    expected,
    mapped,
)
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.codecs.folding import fold
from megatron_lowbit.comm import all_reduce, symmetric_memory, transport
from megatron_lowbit.comm.feedback import ErrorFeedback
from megatron_lowbit.comm.policy.policy import Policy
from megatron_lowbit.comm.traffic import Traffic
from megatron_lowbit.kernels import select
from megatron_lowbit.kernels.peer_memory import PeerMemory
from megatron_lowbit.kernels.switches import disabled


def run_calls(rank: int, directory: Path) -> bool:
    """Every call, each of which must have the bits of plain torch."""
    interpret()
    memory = mapped(rank, dist.get_world_size(), directory, programs=2, seconds=60)
    for collective in ("one-shot", "two-shot"):
        peer_cases.check_carried_call(memory, collective)
    return _run_calls(memory)


def run_calls_on_a_gpu(rank: int) -> bool:
    """The same over torch's symmetric memory, all ranks on one GPU; then as a CUDA graph."""
    memory = peer_cases.opened(torch.device("cuda", 0))
    _run_calls(memory)
    for collective in ("one-shot", "two-shot"):
        peer_cases.check_carried_call(memory, collective)
        peer_cases.check_graph_call(memory, collective)
    dist.barrier()
    return True


def _run_calls(memory: PeerMemory) -> bool:
    for number in range(len(CALLS)):
        peer_cases.check_call(memory, number)
    return True


def run_folded(rank: int, directory: Path) -> bool:
    """A partial that comes rotated, wider than its sum."""
    interpret()
    ranks = dist.get_world_size()
    memory = mapped(rank, ranks, directory, programs=2, seconds=60)
    codec = get_codec("shaped-hybrid")
    _, tables = fold(torch.ones(96, 2), tables_of(codec, 96, 5, ranks=ranks))
    partials = sample("heavy-tailed", (ranks, 3, 101), 0).bfloat16()
    out = torch.empty(3, 96, dtype=torch.bfloat16)
    codec.all_reduce_in(memory, partials[rank], tables, chunk=3, out=out)
    return _is_same(out, expected(partials, tables, codec, "two-shot"))


# Bits, collective, and whether the call goes over symmetric memory; one chain of calls.
CARRIED = [
    (4, "two-shot", True),
    ((3, 1), "two-shot", True),
    (4, "two-shot", False),
    ((1, 2), "two-shot", True),
    (2, "one-shot", True),  # which takes what its rank owes of sums, too
    (1, "one-shot", True),
]


def run_carried(rank: int, directory: Path) -> list[bool]:
    """A chain with error feedback, some of it over symmetric memory: the bits of plain torch.

    In three chunks, the last of which is short: what a rank owes of sums belongs to the same tokens
    both ways. A token is not finite, and so are its carries.
    """
    interpret()
    transport.CHUNK_VALUES = 1
    ranks, group = dist.get_world_size(), dist.group.WORLD
    memory = mapped(rank, ranks, directory, programs=2, seconds=60)
    opened = symmetric_memory.SymmetricMemory(memory, group=lambda: group)
    mixed, plain, traffic, same = ErrorFeedback(), ErrorFeedback(), Traffic(), []
    for seed, (bits, collective, is_shared) in enumerate(CARRIED):
        codec = get_codec("shaped-hybrid", bits=bits)
        call = {"codec": codec, "tables": tables_of(codec, 48, 2 * (seed % 2), ranks=ranks)}
        partial = sample("heavy-tailed", (ranks, 2 * ranks + 1, 48), seed)[rank].bfloat16()
        partial[1, 7] = torch.nan if seed == 1 else 1.0
        policy = Policy(collective, symmetric_memory=opened) if is_shared else collective
        got = all_reduce(partial, **call, collective=policy, feedback=mixed, traffic=traffic)
        with disabled():
            right = all_reduce(partial, **call, collective=collective, feedback=plain)
        same.append(_is_same(got, right))
    assert memory.late.item() == 0 and mixed.dropped == plain.dropped == 0
    assert mixed.bounded == plain.bounded
    shared = [c.why for c in traffic.by_decision]
    assert shared.count("fixed, over symmetric memory") == 2 and len(shared) == 3
    return same


def run_opened(rank: int, directory: Path, fault: str) -> dict:
    """Open a group's memory, with its trial, and all-reduce over it."""
    interpret()
    ranks, group, device = dist.get_world_size(), dist.group.WORLD, torch.device("cpu")

    class Opening:
        def __init__(self, *_):
            self.opened = None

        def allocate(self) -> None:
            if fault == "no memory" and rank == 1:
                raise RuntimeError("no peer\naccess")

        def exchange(self) -> None:
            memory = mapped(rank, ranks, directory, programs=2, seconds=60)
            if fault == "wrong block" and rank == 0:
                memory.peers[1] = memory.peers[0] + MAPPED_BYTES // 2
            self.opened = symmetric_memory.SymmetricMemory(memory, group=lambda: group)

    symmetric_memory._Opening, symmetric_memory._TRIAL_HIDDEN, symmetric_memory._TRIAL_KEPT = (
        Opening,
        64,
        2,
    )
    symmetric_memory._obstacle = lambda device: "no GPU" if fault == "no GPU" and rank == 1 else ""
    symmetric_memory._TRIAL_SECONDS = 0.0001 if fault else 60  # 100 polls
    if fault == "broken kernel" and rank == 0:
        select.symmetric().two_shot = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened = symmetric_memory._open(group, device)
    codec, traffic = get_codec("shaped-hybrid", bits=(4, 6)), Traffic()
    tables = tables_of(codec, 96, 5, ranks=ranks)
    same = []
    for collective, tokens in (("one-shot", 2), ("two-shot", 5), ("two-shot", 30)):
        partials = sample("heavy-tailed", (ranks, tokens, 96), tokens).bfloat16()
        policy = Policy(collective, symmetric_memory=opened)
        out = all_reduce(
            partials[rank], codec=codec, tables=tables, collective=policy, traffic=traffic
        )
        same.append(_is_same(out, expected(partials, tables, codec, collective)))
    return {
        "same": same,
        "status": opened.status(codec),
        "other codec": opened.status(get_codec("int4-g32")),
        "warned": [str(warning.message) for warning in caught],
        "sent": {(c.collective, c.why): k.sent_bytes for c, k in traffic.by_decision.items()},
    }


def run_late(rank: int, directory: Path) -> tuple[int, str]:
    """The last rank never comes: how often the others gave up, and what they said of it."""
    interpret()
    ranks = dist.get_world_size()
    memory = mapped(rank, ranks, directory, programs=2, seconds=0.0005)
    codec = get_codec("rotated-hybrid")
    tables, partial, said = codec.tables(32), torch.ones(2, 32), ""
    if rank < ranks - 1:
        codec.all_reduce_in(memory, partial, tables, chunk=len(partial), out=partial, trap=False)
        try:
            codec.all_reduce_in(memory, partial, tables, chunk=0, out=partial)
        except Exception as error:  # the interpreter wraps what a kernel raises
            said = f"{error} {error.__cause__}"
    dist.barrier()
    return memory.late.item(), said


def _is_same(got: Tensor, right: Tensor) -> bool:
    """Equal, NaN for NaN, and of one type."""
    return got.dtype == right.dtype and torch.equal(got.nan_to_num(12345), right.nan_to_num(12345))
