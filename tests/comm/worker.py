"""Cases of collectives, and what a process makes of one: all ranks' bits must be its own.

A case is drawn by Hypothesis in the test process; all ranks make their partials from its seed, so
any rank knows what all have.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.distributed as dist
from cases import payloads_of, reference_sum, sample, tables_for, through
from torch import Tensor

from megatron_lowbit.codecs import Codec, Tables, get_codec
from megatron_lowbit.comm import all_gather, all_reduce, reduce_scatter, transport
from megatron_lowbit.comm.policy.making import make_policy
from megatron_lowbit.comm.policy.policy import Policy, Settings
from megatron_lowbit.comm.simulated import simulated_all_reduce
from megatron_lowbit.comm.traffic import Counters, Traffic
from megatron_lowbit.comm.transport import owned
from megatron_lowbit.errors import LowbitError


@dataclass(frozen=True)
class Case:
    """One call of one collective."""

    codec: str
    bits: tuple[int, int]
    collective: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kept: int
    chunk_values: int
    seed: int
    low_bit_inside: bool = False

    def make_codec(self) -> Codec:
        return get_codec(self.codec, bits=self.bits)

    def partials(self, ranks: int) -> list[Tensor]:
        seeds = range(100 * self.seed, 100 * self.seed + ranks)
        return [sample("heavy-tailed", self.shape, seed).to(self.dtype) for seed in seeds]

    def tables(self, ranks: int) -> Tables:
        return tables_for(self.make_codec(), self.partials(ranks), min(self.kept, self.shape[-1]))


def error_of(step: Callable[[], object]) -> str:
    """The message of the `LowbitError` that `step` raises; "no error" if it raises none."""
    try:
        step()
    except LowbitError as error:
        return str(error)
    return "no error"


def node_size(ranks: int) -> int:
    """Two nodes, or three at 6 ranks: both forms of the step between nodes."""
    return 2 if ranks in (4, 6) else ranks // 2


def can_run(collective: str, ranks: int) -> bool:
    """Hierarchical needs equal nodes of several ranks."""
    return collective != "hierarchical" or ranks in (4, 6, 8)


def check(rank: int, case: Case) -> None:
    """Run a case on every rank: the bits of one process, and what is counted."""
    ranks, traffic = dist.get_world_size(), Traffic()
    mine = case.partials(ranks)[rank]
    transport.CHUNK_VALUES = case.chunk_values
    out = _send(case, mine, traffic)
    if ranks == 1:  # nothing is sent, nothing is lost
        assert torch.equal(out, mine), case
        assert traffic.total() == Counters(), case
        return
    wanted = _own_part(case, expected(case, ranks), rank)
    assert (out.dtype, out.shape) == (case.dtype, wanted.shape), case
    assert torch.equal(out, wanted), f"rank {rank}: {case}"
    total = traffic.total()
    assert (total.calls, total.values) == (1, mine.numel()), case
    if case.collective != "hierarchical":
        assert total.sent_bytes == sent_by(case, rank), f"rank {rank}: {case}"
    assert [(one.collective, one.why) for one in traffic.by_decision] == [
        (case.collective, "fixed")
    ]
    if rank == 0 and case.collective in ("one-shot", "two-shot"):
        _check_simulated(case, out, traffic)


def _check_simulated(case: Case, out: Tensor, counted: Traffic) -> None:
    """One process gives the same bits and counts what the first rank has counted."""
    ranks, traffic = dist.get_world_size(), Traffic()
    simulated = simulated_all_reduce(
        torch.stack(case.partials(ranks)),
        case.tables(ranks),
        codec=case.make_codec(),
        collective=case.collective,
        traffic=traffic,
    )
    assert simulated.dtype == case.dtype, case
    assert torch.equal(simulated, out), case
    assert replace(traffic.total(), seconds=0) == replace(counted.total(), seconds=0), case
    assert list(traffic.by_decision) == list(counted.by_decision), case


def _send(case: Case, mine: Tensor, traffic: Traffic) -> Tensor:
    ranks = dist.get_world_size()
    codec, tables = case.make_codec(), case.tables(ranks)
    call = {"codec": codec, "tables": tables, "traffic": traffic}
    if case.collective == "reduce-scatter":
        return reduce_scatter(mine, **call)
    if case.collective == "all-gather":
        return all_gather(mine, **call)
    if case.collective == "hierarchical":
        return all_reduce(mine, collective=_two_levels(ranks, case.low_bit_inside), **call)
    return all_reduce(mine, collective=case.collective, **call)


@cache  # its groups are made once
def _two_levels(ranks: int, low_bit_inside: bool) -> Policy:
    return make_policy(
        Settings("hierarchical", node_size=node_size(ranks), low_bit_inside=low_bit_inside),
        group=dist.group.WORLD,
        codec=get_codec(),
        tables=get_codec().tables(64),
        device=torch.device("cpu"),
    )


def expected(case: Case, ranks: int) -> Tensor:
    """fp32 ``[tokens, hidden]``: what the collective must give before rounding, in one process."""
    codec, tables = case.make_codec(), case.tables(ranks)
    flat = [p.reshape(-1, case.shape[-1]) for p in case.partials(ranks)]
    if case.collective == "hierarchical":
        return _hierarchical(case, codec, tables, flat)
    payloads = payloads_of(codec, flat, tables)
    if case.collective == "all-gather":
        one = [tables.of_ranks(rank, rank + 1) for rank in range(ranks)]
        return torch.cat(
            [codec.decode_sum(p[None], own) for p, own in zip(payloads, one, strict=True)]
        )
    if case.collective == "two-shot":
        return _requantized(codec, tables, payloads)
    return codec.decode_sum(payloads, tables)


def _requantized(codec: Codec, tables: Tables, payloads: Tensor) -> Tensor:
    of_sum = codec.reduce_encode(payloads, tables)
    return codec.for_sum().decode_sum(of_sum[None], codec.sum_tables(tables))


def _hierarchical(case: Case, codec: Codec, tables: Tables, flat: list[Tensor]) -> Tensor:
    ranks, size = len(flat), node_size(len(flat))
    nodes = ranks // size
    inside = codec if case.low_bit_inside else get_codec("bf16")
    sums = []
    for node in range(nodes):
        first = node * size
        mine = tables.of_ranks(first, first + size)
        if not case.low_bit_inside:
            mine = inside.tables(tables.hidden)
        sums.append(reference_sum(inside, flat[first : first + size], mine))
    between = tables.of_nodes(nodes)
    payloads = payloads_of(codec, sums, between)
    if nodes > 2:
        total = _requantized(codec, between, payloads)
    else:
        total = codec.decode_sum(payloads, between)
    last = inside.for_sum()
    last_tables = codec.sum_tables(tables) if case.low_bit_inside else inside.tables(tables.hidden)
    return through(last, total, last_tables)


def _own_part(case: Case, total: Tensor, rank: int) -> Tensor:
    """Of the whole result, what this rank gets, in the shape and dtype it gets."""
    ranks, shape = dist.get_world_size(), list(case.shape)
    if case.collective == "reduce-scatter":
        start, stop = owned(len(total), ranks)[rank]
        total, shape[0] = total[start:stop], shape[0] // ranks
    if case.collective == "all-gather":
        shape[0] *= ranks
    return total.to(case.dtype).view(shape)


def sent_by(case: Case, rank: int) -> int:
    """Bytes that a rank must have sent; of hierarchical the parts are tested as such."""
    ranks = dist.get_world_size()
    codec, tables = case.make_codec(), case.tables(ranks)
    tokens, row = torch.Size(case.shape[:-1]).numel(), codec.row_bytes(tables)
    if case.collective in ("one-shot", "all-gather"):
        return (ranks - 1) * tokens * row
    if case.collective == "reduce-scatter":
        return (tokens - tokens // ranks) * row
    sum_row = codec.for_sum().row_bytes(codec.sum_tables(tables))
    total = 0
    for start, stop in transport.chunks(tokens, case.shape[-1], ranks):
        a, b = owned(stop - start, ranks)[rank]
        share = transport.share(stop - start, ranks)
        total += (stop - start - (b - a)) * row + (ranks - 1) * share * sum_row
    return total
