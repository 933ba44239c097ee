"""Two-level all-reduce for groups that span nodes: few bits where the link is slow.

1. Inside each node the ranks reduce-scatter: each owns a share of the tokens and sums it.
2. Ranks with the same place in their nodes all-reduce that share in low bits, over the slow links:
   one-shot between two nodes, two-shot between more.
3. Inside each node the ranks all-gather the sums.

With N nodes of L ranks, a rank sends over the slow link 2 (N - 1) / N of 1/L of the message, in low
bits, where a flat two-shot sends up to 2 (N - 1) / N of all of it. Inside a node the codec is BF16
by default: one quantization (two between more than two nodes); or the low-bit codec itself, which
adds one in step 1 and one in step 3.

A share is summed by rank inside each node and then by node: in fp32, in a fixed order, the same on
all ranks, so all end bit-identical.
"""

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import Codec, Tables, get_codec
from megatron_lowbit.codecs.carry import NO_CARRY, Carry
from megatron_lowbit.comm.one_shot import one_shot_steps
from megatron_lowbit.comm.transport import Channel, Steps, chunks, owned, padded, run, share
from megatron_lowbit.comm.two_shot import two_shot_steps
from megatron_lowbit.errors import LowbitError

_SLOTS = 6


@dataclass(frozen=True)
class Nodes:
    """The two levels of a group.

    Attributes:
        inside: This rank's node, as a group.
        between: The ranks at this rank's place in their nodes, as a group.
        size: Ranks in a node.
        codec_inside: What travels inside a node; the low-bit codec itself if None.
    """

    inside: dist.ProcessGroup
    between: dist.ProcessGroup
    size: int
    codec_inside: Codec | None

    @property
    def count(self) -> int:
        """How many nodes."""
        return dist.get_world_size(self.between)

    @property
    def sends_sums(self) -> bool:
        """Whether a sum travels in low bits: between more than two nodes, or inside one."""
        return self.count > 2 or self.codec_inside is None

    @property
    def number(self) -> int:
        """Which of them this rank is in."""
        return dist.get_rank(self.between)


class Carries(NamedTuple):
    """Error feedback of each quantization; all but `partial` are of tokens that this rank owns.

    Attributes:
        partial: Of this rank's partial, ``[tokens, hidden]``.
        node: Of its node's sum, ``[share, hidden]``, chunk by chunk.
        across: Of the sums that it owns between nodes, where there are more than two.
        total: Of the whole sum, inside the node. Every node makes the same error and carries it.
    """

    partial: Carry = NO_CARRY
    node: Carry = NO_CARRY
    across: Carry = NO_CARRY
    total: Carry = NO_CARRY


_NONE = Carries()


def spans_nodes(group: dist.ProcessGroup) -> bool:
    """Whether torchrun's LOCAL_WORLD_SIZE says that the group's ranks are on several nodes."""
    local = _ranks_of_a_machine()
    if not local:
        return False
    return len({rank // local for rank in dist.get_process_group_ranks(group)}) > 1


def node_size(group: dist.ProcessGroup) -> int:
    """Ranks of `group` in a node, from torchrun's LOCAL_WORLD_SIZE.

    Raises:
        LowbitError: LOCAL_WORLD_SIZE is not a number above zero, or the group is not the same
            number of neighbouring ranks on each node.
    """
    local = _ranks_of_a_machine()
    if not local:
        raise LowbitError(
            f"hierarchical needs the node boundaries, and LOCAL_WORLD_SIZE is "
            f"{os.environ.get('LOCAL_WORLD_SIZE') or 'not set'}: start with torchrun, which sets "
            "it, or give --lowbit-node-size"
        )
    nodes = [rank // local for rank in dist.get_process_group_ranks(group)]
    size = nodes.count(nodes[0])
    if nodes != sorted(nodes) or any(nodes.count(node) != size for node in nodes):
        raise LowbitError(
            f"hierarchical needs as many ranks of the group on each node, one node after another; "
            f"the group's ranks are on nodes {nodes}: choose two-shot"
        )
    return size


def _ranks_of_a_machine() -> int:
    """Torchrun's LOCAL_WORLD_SIZE; 0 where it is not set, or is no number."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdecimal() else 0


def make_nodes(group: dist.ProcessGroup, *, size: int, low_bit_inside: bool = False) -> Nodes:
    """Split `group` into nodes; call it on every rank of the group.

    Args:
        group: The ranks that all-reduce.
        size: Ranks in a node; it divides the group.
        low_bit_inside: Send low bits inside a node, too, instead of BF16.
    """
    ranks = dist.get_process_group_ranks(group)
    mine = dist.get_rank(group)
    first, place = mine - mine % size, mine % size
    inside = dist.new_group(ranks[first : first + size], use_local_synchronization=True)
    between = dist.new_group(ranks[place::size], use_local_synchronization=True)
    return Nodes(inside, between, size, None if low_bit_inside else get_codec("bf16"))


def hierarchical(
    partial: Tensor,
    tables: Tables,
    *,
    codec: Codec,
    nodes: Nodes,
    out: Tensor,
    carries: Carries = _NONE,
) -> int:
    """Sum `partial` over the ranks of all nodes.

    Args:
        partial: Floating point ``[tokens, hidden]``, the same shape on every rank.
        tables: Of this sync point, for all ranks, the same on every rank.
        codec: The same on every rank.
        nodes: From `make_nodes`.
        out: ``[tokens, hidden]`` of any float dtype: the sum, bit-identical on all ranks.
        carries: Error feedback.

    Returns:
        The bytes that this rank sent, inside its node and to others.
    """
    if nodes.sends_sums:
        codec.sum_tables(tables)  # raises on every rank alike, before any of them sends
    spans = chunks(len(partial), partial.shape[1], nodes.size)
    return run(
        _steps(
            partial[a:b],
            tables,
            codec,
            nodes,
            i % _SLOTS,
            out[a:b],
            _of_chunk(carries, a, b, nodes),
        )
        for i, (a, b) in enumerate(spans)
    )


def shares(tokens: int, nodes: Nodes) -> dict[str, int]:
    """Rows of each of `Carries` but the first that there is, for a message of so many tokens."""
    inside = share(tokens, nodes.size)
    across = {"across": tokens} if nodes.count > 2 else {}
    return {"node": inside, **across, "total": inside}


def _of_chunk(carries: Carries, a: int, b: int, nodes: Nodes) -> Carries:
    """Of tokens ``[a, b)``. What is owned between nodes lies as the tokens do, with gaps."""
    first, rows = a // nodes.size, share(b - a, nodes.size)
    of_node = [carry.rows(first, first + rows) for carry in (carries.node, carries.total)]
    across = carries.across.rows(a, a + share(rows, nodes.count))
    return Carries(carries.partial.rows(a, b), of_node[0], across, of_node[1])


def _steps(
    partial: Tensor,
    tables: Tables,
    codec: Codec,
    nodes: Nodes,
    slot: int,
    out: Tensor,
    carries: Carries,
) -> Steps:
    """The steps of one chunk: at most four transfers."""
    inside, between = Channel(nodes.inside, slot), Channel(nodes.between, slot)
    tokens, device = len(partial), partial.device
    first = nodes.number * nodes.size
    in_codec, in_tables = codec, tables.of_ranks(first, first + nodes.size)
    out_codec, out_tables = codec.for_sum(), tables
    if nodes.codec_inside is None:
        out_tables = codec.sum_tables(tables)
    else:
        in_codec = out_codec = nodes.codec_inside
        in_tables = out_tables = in_codec.tables(tables.hidden, device=device)

    start, stop = owned(tokens, nodes.size)[inside.rank]
    total = torch.empty(stop - start, tables.hidden, device=device)
    node_sum = torch.empty_like(total)
    exchange = inside.exchange(tokens, in_codec.row_bytes(in_tables), device)
    gather = inside.gather(share(tokens, nodes.size), out_codec.row_bytes(out_tables), device)
    mine, of_nodes = stop - start, tables.of_nodes(nodes.count)
    sums = (node_sum, of_nodes, codec, between, total, carries.node.rows(0, mine))
    two_level = (carries.across,) if nodes.count > 2 else ()
    across = (two_shot_steps if two_level else one_shot_steps)(*sums, *two_level)
    yield next(across)  # opens its transfers

    payload = in_codec.encode_with_carry(partial, in_tables, carries.partial, rank=inside.rank)
    yield exchange.send(payload)
    in_codec.decode_sum(exchange.received, in_tables, out=node_sum)
    yield from across
    rows = out_codec.encode_with_carry(total, out_tables, carries.total.rows(0, mine))
    yield gather.send(padded(rows, share(tokens, nodes.size)))
    out_codec.decode_sum(gather.received.flatten(0, 1)[None, :tokens], out_tables, out=out)
