"""The symmetric-memory kernels in Triton's interpreter, over memory that processes share.

`test_triton_kernels` runs this in a process of its own, as `triton_cases`. Ranks are processes, and
the memory that all can write is files that all of them map: the rows, the flags and the atomics are
real, only the GPUs are not.
"""

import multiprocessing
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import sample
from ranks import on_each_rank

from megatron_lowbit.benchmark.gpu_check.work import peer_cases
from megatron_lowbit.benchmark.gpu_check.work.interpreted import interpret
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import same, tables_of
from megatron_lowbit.benchmark.gpu_check.work.peer_cases import MAPPED_BYTES, expected
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.codecs.folding import fold
from megatron_lowbit.comm import all_reduce, symmetric_memory, transport
from megatron_lowbit.comm.feedback import ErrorFeedback
from megatron_lowbit.comm.policy.policy import Policy
from megatron_lowbit.comm.symmetric_memory import SymmetricMemory
from megatron_lowbit.comm.traffic import Traffic
from megatron_lowbit.kernels import select
from megatron_lowbit.kernels.peer_memory import PeerMemory
from megatron_lowbit.kernels.switches import disabled

# Operators of our own import the last at their first call, which takes a rank a second.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo"])


def _mapped(rank: int, directory: Path, seconds: float = 60) -> PeerMemory:
    interpret()
    ranks = dist.get_world_size()
    return peer_cases.mapped(rank, ranks, directory, programs=2, seconds=seconds)


def _opened(memory: PeerMemory) -> SymmetricMemory:
    group = dist.group.WORLD
    return SymmetricMemory(memory, group=lambda: group)


@on_each_rank(2, 3)
def test_the_bits_are_those_of_the_collectives(rank, tmp_path):
    memory = _mapped(rank, tmp_path)
    for collective in ("one-shot", "two-shot"):
        peer_cases.check_carried_call(memory, collective)
    for number in range(len(peer_cases.CALLS)):
        peer_cases.check_call(memory, number)


# Bits, collective, and whether the call goes over symmetric memory; one chain of calls.
CARRIED = [
    (4, "two-shot", True),
    ((3, 1), "two-shot", True),
    (4, "two-shot", False),
    ((1, 2), "two-shot", True),
    (2, "one-shot", True),  # which takes what its rank owes of sums, too
    (1, "one-shot", True),
]


@on_each_rank(2, 3)
def test_error_feedback(rank, tmp_path):
    """A chain, some of it over symmetric memory: the bits of plain torch.

    In three chunks, the last of which is short: what a rank owes of sums belongs to the same tokens
    both ways. A token is not finite, and so are its carries.
    """
    memory, ranks = _mapped(rank, tmp_path), dist.get_world_size()
    transport.CHUNK_VALUES = 1
    mixed, plain, traffic = ErrorFeedback(), ErrorFeedback(), Traffic()
    for seed, (bits, collective, is_shared) in enumerate(CARRIED):
        codec = get_codec("shaped-hybrid", bits=bits)
        call = {"codec": codec, "tables": tables_of(codec, 48, 2 * (seed % 2), ranks=ranks)}
        partial = sample("heavy-tailed", (ranks, 2 * ranks + 1, 48), seed)[rank].bfloat16()
        partial[1, 7] = torch.nan if seed == 1 else 1.0
        policy = Policy(collective, symmetric_memory=_opened(memory)) if is_shared else collective
        got = all_reduce(partial, **call, collective=policy, feedback=mixed, traffic=traffic)
        with disabled():
            right = all_reduce(partial, **call, collective=collective, feedback=plain)
        same(got, right, f"call {seed}")
    assert memory.late.item() == 0 and mixed.dropped == plain.dropped == 0
    assert mixed.bounded == plain.bounded
    shared = [choice.why for choice in traffic.by_decision]
    assert shared.count("fixed, over symmetric memory") == 2 and len(shared) == 3


@on_each_rank(2)
def test_a_folded_weight(rank, tmp_path):
    """A partial that comes rotated, wider than its sum."""
    memory, ranks, codec = _mapped(rank, tmp_path), 2, get_codec("shaped-hybrid")
    _, tables = fold(torch.ones(96, 2), tables_of(codec, 96, 5, ranks=ranks))
    partials = sample("heavy-tailed", (ranks, 3, 101), 0).bfloat16()
    out = torch.empty(3, 96, dtype=torch.bfloat16)
    codec.all_reduce_in(memory, partials[rank], tables, chunk=3, out=out)
    same(out, expected(partials, tables, codec, "two-shot"), "folded")


@on_each_rank(3)
def test_a_rank_that_never_comes_ends_the_others(rank, tmp_path):
    memory, codec = _mapped(rank, tmp_path, seconds=0.0005), get_codec("rotated-hybrid")
    tables, partial = codec.tables(32), torch.ones(2, 32)
    if rank < 2:
        codec.all_reduce_in(memory, partial, tables, chunk=len(partial), out=partial, trap=False)
        with pytest.raises(Exception) as error:  # the interpreter wraps what a kernel raises
            codec.all_reduce_in(memory, partial, tables, chunk=0, out=partial)
        said = f"{error.value} {error.value.__cause__}"
        assert "a rank did not come in time" in said
    dist.barrier()
    # 2 programs, 2 barriers of two-shot, and one of one-shot that ends the call: one peer each.
    late = memory.late.item()
    assert late >= 4 if rank < 2 else late == 0


def _open(rank: int, directory: Path, fault: str) -> tuple[SymmetricMemory, list[str]]:
    """Open a group's memory, with its trial; also what was warned of."""
    memory = _mapped(rank, directory)

    class Opening:
        def __init__(self, *_):
            self.opened = None

        def allocate(self) -> None:
            if fault == "no memory" and rank == 1:
                raise RuntimeError("no peer\naccess")

        def exchange(self) -> None:
            if fault == "wrong block" and rank == 0:
                memory.peers[1] = memory.peers[0] + MAPPED_BYTES // 2
            self.opened = _opened(memory)

    symmetric_memory._Opening = Opening
    symmetric_memory._TRIAL_HIDDEN, symmetric_memory._TRIAL_KEPT = 64, 2
    symmetric_memory._obstacle = lambda device: "no GPU" if fault == "no GPU" and rank == 1 else ""
    symmetric_memory._TRIAL_SECONDS = 0.0001 if fault else 60  # 100 polls
    if fault == "broken kernel" and rank == 0:
        select.symmetric().two_shot = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened = symmetric_memory._open(dist.group.WORLD, torch.device("cpu"))
    return opened, [str(warning.message) for warning in caught]


def _sent(rank: int, opened: SymmetricMemory) -> dict[tuple[str, str], int]:
    """Bytes by collective and way of three all-reduces, which must have the right bits."""
    codec, traffic = get_codec("shaped-hybrid", bits=(4, 6)), Traffic()
    tables = tables_of(codec, 96, 5, ranks=2)
    for collective, tokens in (("one-shot", 2), ("two-shot", 5), ("two-shot", 30)):
        partials = sample("heavy-tailed", (2, tokens, 96), tokens).bfloat16()
        policy = Policy(collective, symmetric_memory=opened)
        call = {"codec": codec, "tables": tables, "collective": policy, "traffic": traffic}
        out = all_reduce(partials[rank], **call)
        same(out, expected(partials, tables, codec, collective), f"{collective}, {tokens} tokens")
    return {(c.collective, c.why): k.sent_bytes for c, k in traffic.by_decision.items()}


@on_each_rank(2)
def test_short_messages_go_over_it(rank, tmp_path):
    """And long ones do not; bytes are counted as they are sent."""
    opened, warned = _open(rank, tmp_path, "")
    assert opened.status(get_codec("shaped-hybrid")) == "on" and warned == []
    assert opened.status(get_codec("int4-g32")) == "off: int4-g32 has no kernels for it"
    row, sum_row = 96 // 2 + 2 * 6, 96 * 6 // 8 + 2 * 6
    mine, way = [3, 2][rank], "fixed, over symmetric memory"  # of 5 tokens
    assert _sent(rank, opened) == {
        ("one-shot", way): 2 * row,
        ("two-shot", way): (5 - mine) * row + mine * sum_row,
        ("two-shot", "fixed"): 15 * (row + sum_row),
    }


@pytest.mark.parametrize(
    ("fault", "reason", "warns"),
    [
        ("no GPU", "no GPU", False),
        ("no memory", "torch has no symmetric memory here (RuntimeError: no peer access)", False),
        ("wrong block", "its trial failed (RuntimeError: a rank did not come within 0 s)", True),
        (
            "broken kernel",
            "its trial failed (TypeError: 'NoneType' object is not callable)",
            True,
        ),
    ],
)
@on_each_rank(2)
def test_without_it_all_ranks_go_the_other_way(rank, fault, reason, warns, tmp_path):
    """One rank's trouble is everyone's, with its reason."""
    opened, warned = _open(rank, tmp_path, fault)
    assert opened.status(get_codec("shaped-hybrid")) == f"off: {reason}"
    assert bool(warned) == warns
    assert list(_sent(rank, opened)) == [("one-shot", "fixed"), ("two-shot", "fixed")]
