"""What a collective takes, from latency, bandwidth and codec time: pure formulas.

For a message of v values over N ranks, with b bytes a value on the wire in the first step and s in
the second (`Message`), and the figures of one machine (`Costs`):

    native       l_native + 2 (N-1)/N * 2v / B_native                 a BF16 ring
    one-shot     l + pipe(send = (N-1) b v / B,            work = v (enc + N dec + turn))
    two-shot   2 l + pipe(send = (N-1)/N (b + s) v / B,    work = v (enc + enc/N + 2 dec + turn))
    hierarchical   a BF16 reduce-scatter and all-gather inside the node, and one-shot or two-shot of
                   v / L values between N/L nodes of L ranks

    pipe(send, work) = max(send', work') + min(send', work') / chunks
    send'            = send + (chunks - 1) * transfers * per_transfer
    work'            = work + (chunks - 1) * transfers * per_chunk

l is the latency of one step, B what one rank sends a second while it receives as much; enc, dec and
turn are the codec's seconds a value to encode, to decode and add one payload, and to finish a sum
(turn back, round, store). A message of several chunks sends one while it works on another, so
only the longer of both counts, and a chunk's worth of the shorter. Each transfer of a further chunk
takes `per_chunk` of the work's time (Gloo's messages cost processor time) and `per_transfer` of the
link's (zero where B is that of a stream of chunks). The formulas are checked against emulated links
by tools/predict.py --check.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_lowbit.comm.policy.timings import BF16_BYTES
from megatron_lowbit.comm.transport import chunk_values


@dataclass(frozen=True)
class Costs:
    """Figures of one machine, group and codec; seconds, and bytes a second each way.

    Attributes:
        latency: One step of ours with hardly any bytes: call, encode and decode included.
        bandwidth: What a rank sends a second.
        native_latency: The backend's BF16 all-reduce with hardly any bytes.
        native_bandwidth: What a rank sends a second inside it.
        encode: Codec, a value.
        decode: Codec, a value of one payload.
        turn: Codec, a value of a finished sum.
        per_chunk: What each transfer of a chunk after the first takes from the codec's work.
        per_transfer: What it takes from the link, beyond its bytes at `bandwidth`.
    """

    latency: float
    bandwidth: float
    native_latency: float
    native_bandwidth: float
    encode: float
    decode: float
    turn: float
    per_chunk: float = 0.0
    per_transfer: float = 0.0


@dataclass(frozen=True)
class Message:
    """What is sent: values, ranks, and the codec's bytes a value in either step."""

    values: int
    ranks: int
    partial_bytes: float
    sum_bytes: float

    @property
    def ring(self) -> float:
        """The share of a tensor that a rank sends in one pass of a ring or an all-to-all."""
        return (self.ranks - 1) / self.ranks


def native(m: Message, c: Costs) -> float:
    """Seconds of the backend's BF16 all-reduce."""
    return c.native_latency + 2 * m.ring * BF16_BYTES * m.values / c.native_bandwidth


def one_shot(m: Message, c: Costs) -> float:
    """Seconds of one-shot."""
    send = (m.ranks - 1) * m.partial_bytes * m.values / c.bandwidth
    work = m.values * (c.encode + m.ranks * c.decode + c.turn)
    return c.latency + _pipe(send, work, m, c, shares=1)


def two_shot(m: Message, c: Costs) -> float:
    """Seconds of two-shot."""
    send = m.ring * (m.partial_bytes + m.sum_bytes) * m.values / c.bandwidth
    work = m.values * (c.encode * (1 + 1 / m.ranks) + 2 * c.decode + c.turn)
    return 2 * c.latency + _pipe(send, work, m, c, transfers=2)


def hierarchical(
    m: Message, c: Costs, *, node_size: int, inside: Costs, low_bit_inside: bool = False
) -> float:
    """Seconds of the two-level all-reduce.

    Args:
        m: The message over all ranks.
        c: Between nodes.
        node_size: Ranks in a node.
        inside: Inside a node; BF16 costs no codec time there.
        low_bit_inside: Send low bits inside a node, too.
    """
    share = replace(m, values=m.values // node_size, ranks=m.ranks // node_size)
    between = one_shot(share, c) if share.ranks == 2 else two_shot(share, c)
    node = replace(m, ranks=node_size)
    if low_bit_inside:
        return two_shot(node, inside) + between
    passes = 2 * node.ring * BF16_BYTES * m.values / inside.bandwidth
    return 2 * inside.latency + passes + between


FORMULAS: dict[str, Callable[[Message, Costs], float]] = {
    "native": native,
    "one-shot": one_shot,
    "two-shot": two_shot,
}


def _pipe(
    send: float, work: float, m: Message, c: Costs, *, shares: int = 0, transfers: int = 1
) -> float:
    """Seconds of the pipeline; the ranks share a chunk, unless `shares` says how many parts."""
    chunks = max(-(-m.values // chunk_values(m.values, shares or m.ranks)), 1)
    further = (chunks - 1) * transfers
    send, work = send + further * c.per_transfer, work + further * c.per_chunk
    return max(send, work) + min(send, work) / chunks
