"""Links, cards and models that are not here, as figures for the cost model.

Every figure has its source behind it. [N] is NCCL's own model of its latencies (NVIDIA/nccl,
src/graph/tuning.cc, commit 01afd20, protocol LL): a start and a time a hop, of which an all-reduce
takes 2 (L - 1) in a node of L ranks and 2 log2(nodes) between nodes by a tree, or 2 (N - 1) around
a ring, whichever is faster; a step of ours is taken for half of that ring. [S] is the vendor's data
sheet. [D] is the project's survey of published measurements, the middle where it has a range.
"Assumed" is just that.

How ranks are joined: over NVLink and PCIe up to 8 ranks are one node. Over a network up to 8 ranks
are on a node each, with a NIC of their own; more are nodes of 8, joined inside by `Link.inside`,
with `Link.nics` NICs a node that all its ranks share alike.

No GPU kernel of ours has been measured: the codec is assumed to be bound by the card's memory, at
`MEMORY_SHARE` of its bandwidth, and to take `LAUNCH` a kernel.
"""

import math
from dataclasses import dataclass

import torch

from megatron_lowbit.benchmark.prediction.cost_model import Costs, Message
from megatron_lowbit.codecs.rotated_hybrid import RotatedHybrid
from megatron_lowbit.comm.policy.timings import BF16_BYTES
from megatron_lowbit.errors import LowbitError

NODE_SIZE = 8
MEMORY_SHARE = 0.75  # assumed: of the card's bandwidth, for kernels that read and write once
LAUNCH = 4e-6  # assumed: one short kernel in a CUDA graph, its start and its end
TREE_START = 4.4e-6  # [N]
RING_START = 3.6e-6  # [N]
NVLS = 10e-6  # [D]: 8.5-11 us, an all-reduce of a few KB inside the NVLink switch


@dataclass(frozen=True)
class Card:
    """A GPU: name and memory bandwidth in bytes a second."""

    name: str
    memory: float


L40S = Card("L40S", 0.864e12)  # [S]
H100_PCIE = Card("H100 PCIe", 2.0e12)  # [S]
H200 = Card("H200", 4.8e12)  # [S]


@dataclass(frozen=True)
class Link:
    """What joins ranks.

    Attributes:
        bandwidth: Usable bytes a second each way, of a rank's link or of one NIC.
        tree_hop: Seconds a hop in a tree.
        ring_hop: Seconds a hop around a ring.
        card: The GPU that it is typically found with.
        source: Where the figures are from.
        inside: For a network: the link inside nodes of 8.
        nics: For a network: NICs of such a node.
    """

    bandwidth: float
    tree_hop: float
    ring_hop: float
    card: Card
    source: str
    inside: str | None = None
    nics: int = 1


_NET = (5.0e-6, 2.7e-6)  # [N]: NET
_TCP = (25e-6, 25e-6)  # assumed: TCP through the kernel, both ends
LINKS = {
    "nvlink-4": Link(370e9, 0.52e-6, 0.47e-6, H200, "[D] 370 of 450 GB/s; [N] NVLINK"),
    "pcie-4": Link(23e9, 1.0e-6, 1.0e-6, L40S, "[D] 20-26 GB/s; [N] PCI"),
    "pcie-5": Link(39e9, 1.0e-6, 1.0e-6, H100_PCIE, "[D] 28-50 GB/s; [N] PCI"),
    "ethernet-25": Link(3e9, *_TCP, L40S, "[D] 3 GB/s; TCP, 25 us a hop assumed", "pcie-4"),
    "ethernet-100": Link(12e9, *_NET, L40S, "[D] 12 GB/s; RoCE as [N] NET assumed", "pcie-4"),
    "ethernet-200": Link(
        24e9, *_NET, H100_PCIE, "96 % of the rate, as 100 Gbit/s, assumed; as [N] NET", "pcie-5", 2
    ),
    "ethernet-400": Link(
        48e9, *_NET, H100_PCIE, "96 % of the rate, as 100 Gbit/s, assumed; as [N] NET", "pcie-5", 2
    ),
    "infiniband-hdr": Link(
        23e9, *_NET, H200, "93 % of 25 GB/s, as NDR, assumed; [N] NET", "nvlink-4", 8
    ),
    "infiniband-ndr": Link(46.5e9, *_NET, H200, "[D] 43-50 GB/s a NIC; [N] NET", "nvlink-4", 8),
}


@dataclass(frozen=True)
class Model:
    """A Llama 3 shape ("The Llama 3 Herd of Models", table 3); two sync points a layer."""

    hidden: int
    layers: int
    heads: int

    @property
    def sync_points(self) -> int:
        """All-reduces in one pass."""
        return 2 * self.layers


MODELS = {
    "8b": Model(4096, 32, 32),
    "70b": Model(8192, 80, 64),
    "405b": Model(16384, 126, 128),
}


@dataclass(frozen=True)
class Setup:
    """The cost model's figures for a link and a number of ranks.

    Attributes:
        flat: Of a collective over all ranks.
        between: Between nodes, where there are several of 8 ranks.
        inside: Inside such a node.
    """

    flat: Costs
    between: Costs | None = None
    inside: Costs | None = None


def payload_bytes(hidden: int, bits: tuple[int, int]) -> tuple[float, float]:
    """Bytes a value of a partial and of the sum, from the codec's own rows.

    Raises:
        LowbitError: The codec has no such bits.
    """
    codec = RotatedHybrid(bits[0], sum_bits=bits[1])
    kept = torch.arange(codec.default_bf16_features(hidden))
    tables = codec.tables(hidden, bf16_index=kept)
    return codec.row_bytes(tables) / hidden, codec.for_sum().row_bytes(tables) / hidden


def setup(name: str, message: Message) -> Setup:
    """The figures of the link `name` for the ranks and payloads of `message`.

    Raises:
        LowbitError: The link does not join so many ranks.
    """
    link, ranks = LINKS[name], message.ranks
    if link.inside is None and ranks > NODE_SIZE:
        raise LowbitError(
            f"{name} joins up to {NODE_SIZE} ranks here: for {ranks} choose a network, "
            f"{', '.join(networks())}"
        )
    if link.inside is None or ranks <= NODE_SIZE:
        return Setup(_one_level(link, message))
    return _two_levels(link, message)


def networks() -> list[str]:
    """The links that join nodes."""
    return [name for name, link in LINKS.items() if link.inside is not None]


def _one_level(link: Link, message: Message) -> Costs:
    """All ranks alike: one node, or a node each."""
    ranks = message.ranks
    hops = 2 * (ranks - 1) if link.inside is None else 2 * math.log2(ranks)
    ring = (ranks - 1) * link.ring_hop
    native = _native_latency(hops * link.tree_hop, ring)
    if link is LINKS["nvlink-4"]:
        native = min(native, NVLS)
    return _costs(link.card, message, link.bandwidth, ring, link.bandwidth, native)


def _two_levels(net: Link, message: Message) -> Setup:
    """Nodes of 8 behind shared NICs."""
    assert net.inside is not None, "a network joins nodes"
    ranks, size, node = message.ranks, NODE_SIZE, LINKS[net.inside]
    nodes = ranks // size
    share = net.bandwidth * net.nics / size
    # NCCL's rings cross each node's border once, on every NIC: the narrower of both counts. Between
    # two nodes its trees carry the tensor across once, not 2 (N - 1) / N times.
    crossing = net.bandwidth * net.nics * (2 * message.ring if nodes == 2 else 1)
    native_bandwidth = min(node.bandwidth, crossing)
    inner, outer = (size - 1) * node.ring_hop, (nodes - 1) * net.ring_hop
    ring = nodes * inner + outer
    tree = 2 * (size - 1) * node.tree_hop + 2 * math.log2(nodes) * net.tree_hop
    # All to all: of a rank's N - 1 messages, N - 8 leave the node through its share of the NICs.
    bandwidth = (ranks - 1) * min(share / (ranks - size), node.bandwidth / (size - 1))

    def costs(bandwidth: float, hops: float) -> Costs:
        native = native_bandwidth, _native_latency(tree, ring)
        return _costs(net.card, message, bandwidth, hops, *native)

    return Setup(costs(bandwidth, ring), costs(share, outer), costs(node.bandwidth, inner))


def _native_latency(tree: float, ring: float) -> float:
    """Of an all-reduce, from the hops of a tree and of one pass around a ring; all in seconds."""
    return min(TREE_START + tree, RING_START + 2 * ring)


def _costs(
    card: Card,
    message: Message,
    bandwidth: float,
    hops: float,
    native_bandwidth: float,
    native_latency: float,
) -> Costs:
    memory, transfer = card.memory * MEMORY_SHARE, RING_START + hops
    return Costs(
        latency=transfer + 2 * LAUNCH,
        bandwidth=bandwidth,
        native_latency=native_latency,
        native_bandwidth=native_bandwidth,
        encode=(BF16_BYTES + message.partial_bytes) / memory,
        decode=message.partial_bytes / memory,
        turn=BF16_BYTES / memory,
        per_chunk=LAUNCH,
        per_transfer=transfer,
    )
