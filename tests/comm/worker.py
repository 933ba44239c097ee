"""What every rank of the collective tests does: the cases, and what a process makes of one.

A case is drawn by Hypothesis in the test process; all ranks make their partials from its seed, so
any rank knows what all have.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from cases import sample, tables_for
from torch import Tensor

from megatron_lowbit.codecs import Codec, Tables, get_codec
from megatron_lowbit.comm import all_gather, all_reduce, reduce_scatter, transport
from megatron_lowbit.comm.policy.making import make_policy
from megatron_lowbit.comm.policy.policy import Policy, Settings
from megatron_lowbit.comm.traffic import Traffic
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


def run_cases(rank: int, cases: list[Case]) -> list[dict]:
    """The result of every case on this rank."""
    results = []
    policies: dict[bool, Policy] = {}
    for case in cases:
        transport.CHUNK_VALUES = case.chunk_values
        results.append(_run_case(rank, dist.get_world_size(), case, policies))
    return results


def _run_case(rank: int, ranks: int, case: Case, policies: dict[bool, Policy]) -> dict:
    codec, tables = case.make_codec(), case.tables(ranks)
    mine, traffic = case.partials(ranks)[rank], Traffic()
    call = {"codec": codec, "tables": tables, "traffic": traffic}
    if case.collective == "reduce-scatter":
        out = reduce_scatter(mine, **call)
    elif case.collective == "all-gather":
        out = all_gather(mine, **call)
    elif case.collective == "hierarchical":
        inside = case.low_bit_inside
        if inside not in policies:
            settings = Settings("hierarchical", node_size=node_size(ranks), low_bit_inside=inside)
            policies[inside] = make_policy(
                settings, group=dist.group.WORLD, codec=codec, tables=tables, device=mine.device
            )
        out = all_reduce(mine, collective=policies[inside], **call)
    else:
        out = all_reduce(mine, collective=case.collective, **call)
    return {"out": out, "traffic": traffic.total(), "choices": list(traffic.by_decision)}


def expected(case: Case, ranks: int) -> Tensor:
    """fp32 ``[tokens, hidden]``: what the collective must give before rounding, in one process."""
    codec, tables = case.make_codec(), case.tables(ranks)
    flat = [p.reshape(-1, case.shape[-1]) for p in case.partials(ranks)]
    if case.collective == "all-gather":
        payloads = [codec.encode(p, tables, rank=r) for r, p in enumerate(flat)]
        shards = [
            codec.decode_sum(payload[None], tables.of_ranks(r, r + 1))
            for r, payload in enumerate(payloads)
        ]
        return torch.cat(shards)
    if case.collective == "hierarchical":
        return _hierarchical(case, codec, tables, flat)
    payloads = torch.stack([codec.encode(p, tables, rank=r) for r, p in enumerate(flat)])
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
        rows = [inside.encode(p, mine, rank=r) for r, p in enumerate(flat[first : first + size])]
        sums.append(inside.decode_sum(torch.stack(rows), mine))
    between = tables.of_nodes(nodes)
    payloads = torch.stack([codec.encode(s, between, rank=r) for r, s in enumerate(sums)])
    if nodes > 2:
        total = _requantized(codec, between, payloads)
    else:
        total = codec.decode_sum(payloads, between)
    last = inside.for_sum()
    last_tables = codec.sum_tables(tables) if case.low_bit_inside else inside.tables(tables.hidden)
    return last.decode_sum(last.encode(total, last_tables)[None], last_tables)


def own_part(case: Case, total: Tensor, ranks: int, rank: int) -> Tensor:
    """Of the whole result, what this rank gets, in the shape and dtype it gets."""
    shape = list(case.shape)
    if case.collective == "reduce-scatter":
        start, stop = owned(len(total), ranks)[rank]
        total, shape[0] = total[start:stop], shape[0] // ranks
    if case.collective == "all-gather":
        shape[0] *= ranks
    return total.to(case.dtype).view(shape)


def sent_by(case: Case, ranks: int, rank: int) -> int | None:
    """Bytes that a rank must have sent; None for hierarchical, whose parts are tested as such."""
    codec, tables = case.make_codec(), case.tables(ranks)
    tokens, row = torch.Size(case.shape[:-1]).numel(), codec.row_bytes(tables)
    if case.collective in ("one-shot", "all-gather"):
        return (ranks - 1) * tokens * row
    if case.collective == "reduce-scatter":
        return (tokens - tokens // ranks) * row
    if case.collective == "hierarchical":
        return None
    sum_row = codec.for_sum().row_bytes(codec.sum_tables(tables))
    total = 0
    for start, stop in transport.chunks(tokens, case.shape[-1], ranks):
        a, b = owned(stop - start, ranks)[rank]
        share = transport.share(stop - start, ranks)
        total += (stop - start - (b - a)) * row + (ranks - 1) * share * sum_row
    return total
