"""The all-reduces over symmetric memory, against plain torch: what each rank does and must get.

Of tests/kernels, where the memory that all can write is files that all of them map, and of the
check on a GPU, where it is torch's and all ranks have one GPU. Every rank makes the same calls in
the same order.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import (
    new_carry,
    same,
    sample,
    tables_of,
)
from megatron_lowbit.codecs import Codec, Tables, get_codec
from megatron_lowbit.codecs.carry import Carry
from megatron_lowbit.comm import symmetric_memory
from megatron_lowbit.comm.simulated import simulated_all_reduce
from megatron_lowbit.comm.traffic import Traffic
from megatron_lowbit.comm.transport import owned, share
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels.peer_memory import PeerMemory
from megatron_lowbit.kernels.switches import disabled

SECONDS = 30.0  # that a rank waits for its peers
MAPPED_BYTES = 1 << 13  # of a block that is a file
# That ranks wait for one that does not come: in the interpreter a look takes far longer.
Check = Callable[[PeerMemory], None]
_LATE_SECONDS = {"cuda": 0.2, "cpu": 0.0005}
_CARRIED = (7, 96)  # tokens, hidden
# Codec, bits, collective, tokens, hidden, BF16 features, dtype.
CALLS: list[tuple[str, int | tuple[int, int], str, int, int, int, torch.dtype]] = [
    ("rotated-hybrid", 4, "one-shot", 1, 96, 5, torch.bfloat16),
    ("rotated-hybrid", 4, "two-shot", 1, 96, 5, torch.bfloat16),
    ("shaped-hybrid", (3, 5), "two-shot", 7, 96, 3, torch.float32),
    ("shaped-hybrid", 3, "one-shot", 5, 96, 3, torch.float16),
    ("rotated-hybrid", 2, "one-shot", 0, 64, 0, torch.bfloat16),
    ("rotated-hybrid", 6, "two-shot", 3, 33, 0, torch.bfloat16),
    ("rotated-hybrid", (4, 6), "two-shot", 9, 64, 1, torch.bfloat16),
    ("rotated-hybrid", 5, "one-shot", 3, 200, 7, torch.bfloat16),
]


def mapped(rank: int, ranks: int, directory: Path, *, programs: int, seconds: float) -> PeerMemory:
    """The memory of a group, mapped by this process; rubbish where nothing must be zero."""
    blocks = []
    for owner in range(ranks):
        path = directory / f"block{owner}"
        if owner == rank:
            zeros = 4 * programs * ranks
            path.write_bytes(bytes(zeros) + b"\xa5" * (MAPPED_BYTES - zeros))
        dist.barrier()
        block = torch.from_file(str(path), shared=True, size=MAPPED_BYTES, dtype=torch.uint8)
        blocks.append(block)
    memory = PeerMemory(
        peers=torch.tensor([block.data_ptr() for block in blocks]),
        calls=torch.zeros(programs, dtype=torch.int32),
        late=torch.zeros(1, dtype=torch.int32),
        rank=rank,
        size=MAPPED_BYTES,
        seconds=seconds,
    )
    memory.calls.blocks = blocks  # type: ignore[attr-defined]  # kept as long as the memory
    return memory


def opened(device: torch.device) -> PeerMemory:
    """Torch's symmetric memory of the default group, all of whose ranks have `device`."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    torch.cuda.set_device(device)
    assert dist.group.WORLD is not None, "it was started"
    opening = symmetric_memory._Opening(dist.group.WORLD, device)
    opening.allocate()
    dist.barrier()
    opening.exchange()
    found = opening.opened
    assert found is not None and found.memory is not None, "both steps have been made"
    _kept.append(found)
    return found.memory


_kept: list = []  # what must live as long as the memory


def expected(partials: Tensor, tables: Tables, codec: Codec, collective: str) -> Tensor:
    """The sum of ``[ranks, tokens, hidden]``, by plain torch on the CPU."""
    with disabled():
        return simulated_all_reduce(
            partials, tables, codec=codec, collective=collective, traffic=Traffic()
        )


def checks(*, graphs: bool, calls: int = len(CALLS)) -> list[tuple[str, Check]]:
    """What a rank does, in order; after the last the memory serves no more."""
    collectives = ("one-shot", "two-shot")
    found: list[tuple[str, Check]] = []
    for number, (name, bits, collective, tokens, hidden, *_) in enumerate(CALLS[:calls]):
        title = f"{name} {bits} bits {collective} {tokens} x {hidden}"
        found.append((title, partial(check_call, number=number)))
    found += [(f"carry {c}", partial(check_carried_call, collective=c)) for c in collectives]
    if graphs:
        found += [(f"graph {c}", partial(check_graph_call, collective=c)) for c in collectives]
    return [*found, ("a missing rank", check_missing_rank)]


def check_call(memory: PeerMemory, number: int) -> None:
    """One of `CALLS`, with ranks that come at other times; a token is not finite.

    In a series of calls rows lie where others lay before, as there are more calls than halves.
    """
    name, bits, collective, tokens, hidden, kept, dtype = CALLS[number]
    codec, device = get_codec(name, bits=bits), memory.calls.device
    tables = tables_of(codec, hidden, kept, ranks=memory.ranks)
    partials = sample("heavy-tailed", (memory.ranks, tokens, hidden), number).to(dtype)
    if tokens > 1:
        partials[-1, 1, 0] = torch.nan
    right = expected(partials, tables, codec, collective)
    partial = partials[memory.rank].to(device).T.contiguous().T  # strided; the sum goes there, too
    time.sleep(0.05 * ((memory.rank + number) % memory.ranks))
    chunk = tokens * (collective == "two-shot")
    codec.all_reduce_in(memory, partial, tables.to(device), chunk=chunk, out=partial)
    if late := memory.late.item():
        raise LowbitError(f"{late} programs gave up waiting for a rank")
    same(partial, right, f"{codec} {collective}")


def check_graph_call(memory: PeerMemory, collective: str) -> None:
    """Three calls in a CUDA graph, so that the halves change from replay to replay."""
    codec, device = get_codec("rotated-hybrid"), memory.calls.device
    tables = tables_of(codec, 4096, 32, ranks=memory.ranks)
    on_device, chunk = tables.to(device), 8 * (collective == "two-shot")
    partial, out = torch.empty(2, 8, 4096, dtype=torch.bfloat16, device=device)

    def call() -> None:
        codec.all_reduce_in(memory, partial, on_device, chunk=chunk, out=out)

    partial.zero_()
    call()  # what is compiled or made at the first call cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            call()
    for seed in range(4):
        partials = sample("heavy-tailed", (memory.ranks, 8, 4096), seed).bfloat16()
        partial.copy_(partials[memory.rank])
        graph.replay()
        right = expected(partials, tables, codec, collective)
        same(out, right, f"{codec} {collective}, replay {seed} of a CUDA graph")


def check_carried_call(memory: PeerMemory, collective: str) -> None:
    """One call with error feedback of the partial and, in two-shot, of the sums this rank owns."""
    tokens, hidden = _CARRIED
    codec, rank, device = get_codec("shaped-hybrid", bits=(4, 2)), memory.rank, memory.calls.device
    tables = tables_of(codec, hidden, 5, ranks=memory.ranks)
    partials = sample("heavy-tailed", (memory.ranks, tokens, hidden), 7).bfloat16()
    taken = sample("normal", partials.shape, 8).bfloat16()
    of_sums = sample("normal", (tokens, hidden), 9).bfloat16()
    right, given, given_sum = _carried_sum(codec, tables, partials, taken, of_sums, collective)
    mine = new_carry(taken[rank], tokens, hidden, device)
    start, stop = owned(tokens, memory.ranks)[rank]
    rows = torch.zeros(share(tokens, memory.ranks), hidden, dtype=torch.bfloat16)
    rows[: stop - start] = of_sums[start:stop]
    of_sum = new_carry(rows, len(rows), hidden, device)
    out = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=device)
    more = {"chunk": tokens, "of_sum": of_sum} if collective == "two-shot" else {"chunk": 0}
    codec.all_reduce_in(
        memory, partials[rank].to(device), tables.to(device), out=out, carry=mine, **more
    )
    assert mine.given is not None and of_sum.given is not None, "`new_carry` has them"
    case = f"{codec} {collective} with a carry"
    same(out, right, case)
    same(mine.given, given[rank], f"{case}: what the partial gives")
    if collective == "two-shot":
        theirs = of_sum.given[: stop - start]
        same(theirs, given_sum[start:stop], f"{case}: what the sums give")


def _carried_sum(
    codec: Codec, tables: Tables, partials: Tensor, taken: Tensor, of_sums: Tensor, collective: str
) -> tuple[Tensor, Tensor, Tensor]:
    """By plain torch: the sum, what each rank's partial gives, what each sum gives."""
    given, given_sum = torch.empty_like(taken), torch.empty_like(of_sums)
    with disabled():
        payloads = torch.stack(
            [
                codec.encode_with_carry(partial, tables, Carry(taken[r], given[r]), rank=r)
                for r, partial in enumerate(partials)
            ]
        )
        if collective == "two-shot":
            summed = codec.reduce_encode_with_carry(payloads, tables, Carry(of_sums, given_sum))
            total = codec.for_sum().decode_sum(summed[None], codec.sum_tables(tables))
        else:
            total = codec.decode_sum(payloads, tables)
    return total.to(partials.dtype), given, given_sum


def check_missing_rank(memory: PeerMemory) -> None:
    """The last rank does not come: the others give up, and say that it was late.

    The group's memory serves no more afterwards.
    """
    if memory.rank == memory.ranks - 1:
        return
    waiting = replace(memory, seconds=_LATE_SECONDS[memory.calls.device.type])
    codec, device = get_codec("rotated-hybrid"), memory.calls.device
    partial = torch.ones(2, 32, device=device)
    tables = codec.tables(32, device=device)
    codec.all_reduce_in(waiting, partial, tables, chunk=2, out=partial, trap=False)
    if memory.late.item() == 0:
        raise LowbitError("a rank did not come, and no program said that it was late")
