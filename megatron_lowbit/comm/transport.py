"""Moving payload rows between ranks: buffers, the two primitives, and the pipeline over chunks.

A collective is written as a generator of *steps* for one chunk of tokens: it opens its transfers
and yields once; then it encodes, sends, yields the transfer that is under way, goes on when its
bytes have come, and so on to the end. `run` drives the chunks of a message so that while the bytes
of one travel another is encoded or decoded, as far as the backend works in the background (Gloo has
a thread for it, NCCL a stream). The order of transfers depends on the number of chunks alone, so it
is the same on every rank.

Workspace: received bytes land in buffers that are kept per group, allocated once per slot and size
class (powers of two) and used again by every later call. A chunk has at most `CHUNK_VALUES` values
(or a token) for each rank that shares it, and a collective has few chunks under way, which bounds
the buffers whatever the message size (comm/README.md, "Memory").
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

Steps = Generator["Transfer | None", None, None]

# Most values of a chunk that go from one rank to another: 280 KB at 4.2 bits. Smaller messages
# cost more processor time in Gloo (0.1 ms each) than they let overlap: 16 MB, 4 ranks, 1 Gbit/s,
# 2 cores: two-shot takes 104 ms with chunks of 1/4 of this, 74 with 1/2, 68 with this. On GPUs,
# where a chunk costs launches, nothing has been measured and more may be better.
CHUNK_VALUES = 1 << 19
# Of our point-to-point messages; each slot and use has a tag of its own.
_TAG = 0x10B17

# torch 2.13 renames these and warns where the old names are used.
native_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
native_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_workspaces: WeakKeyDictionary[dist.ProcessGroup, dict] = WeakKeyDictionary()


@dataclass(frozen=True)
class Channel:
    """One group and one slot of its workspace: what a chunk's steps communicate through."""

    group: dist.ProcessGroup
    slot: int

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def exchange(self, tokens: int, row_bytes: int, device: torch.device) -> "Transfer":
        """Each rank is to get its own tokens (`owned`) from all."""
        counts = [stop - start for start, stop in owned(tokens, self.ranks)]
        return self.exchange_blocks(counts, row_bytes, device)

    def exchange_blocks(
        self, counts: list[int], row_bytes: int, device: torch.device
    ) -> "Transfer":
        """Each rank is to get its own block of `counts` tokens from all."""
        return Transfer(self, "exchange", counts, counts[self.rank], row_bytes, device)

    def gather(self, rows: int, row_bytes: int, device: torch.device) -> "Transfer":
        """Each rank is to get the rows of all, as many of each."""
        return Transfer(self, "gather", [rows] * self.ranks, rows, row_bytes, device)

    def buffer(self, use: str, size: int, device: torch.device) -> Tensor:
        """``uint8 [size]`` of the workspace."""
        size_class = 1 << max(size - 1, 0).bit_length()
        key = (use, self.slot, size_class, device)
        buffers = _workspaces.setdefault(self.group, {})
        if key not in buffers:
            # One made in inference mode could not be written outside it.
            with torch.inference_mode(False):
                buffers[key] = torch.empty(size_class, dtype=torch.uint8, device=device)
        return buffers[key][:size]


class Transfer:
    """Rows that go from every rank to every rank; receiving is open before anything is sent.

    Gloo goes by pairs of sends and receives. Its all-to-all posts its sends before its receives and
    often uses one direction of a link at a time (4 MB, 2 ranks, 1 Gbit/s: 33 ms, pairs 17 ms), its
    all-gather is a ring of ranks - 1 steps (1 MB, 8 ranks, 1 Gbit/s: 13.7 ms, pairs 10.4 ms), and
    a receive that is posted late is announced to the sender behind all that this rank is sending.

    Attributes:
        received: ``uint8 [ranks, rows, row_bytes]``, to be read after `wait`.
        sent_bytes: Bytes that this rank has sent to others.
    """

    def __init__(
        self,
        channel: Channel,
        use: str,
        counts: list[int],
        rows: int,
        row_bytes: int,
        device: torch.device,
    ):
        self._channel, self._use, self._counts = channel, use, counts
        buffer = channel.buffer(use, channel.ranks * rows * row_bytes, device)
        self.received = buffer.view(channel.ranks, rows, row_bytes)
        self.sent_bytes = 0
        self._works: list[dist.Work] = []
        self._source: Tensor | None = None
        self._by_pairs = "gloo" in str(dist.get_backend(channel.group))
        self._tag = _TAG + 2 * channel.slot + (use == "gather")
        if self._by_pairs and self.received.numel():
            for step in range(1, channel.ranks):
                self._receive((channel.rank - step) % channel.ranks)

    def send(self, payload: Tensor) -> "Transfer":
        """Send rows ``uint8 [n, row_bytes]``: each rank its own (exchange), or all to all."""
        self._source = payload  # the backend reads it until `wait`
        if self._use == "gather":
            parts = [payload] * self._channel.ranks
        else:
            parts = list(payload.split(self._counts))
        own = self._channel.rank
        self.sent_bytes = sum(part.numel() for rank, part in enumerate(parts) if rank != own)
        if self._by_pairs:
            self.received[own].copy_(parts[own])
            for step in range(1, self._channel.ranks):
                self._send((own + step) % self._channel.ranks, parts)
        else:
            self._works.append(self._collective(payload))
        return self

    def wait(self) -> None:
        """Until all bytes have come and gone."""
        for work in self._works:
            work.wait()

    # The group's own send and recv: dist.isend and dist.irecv check more and take 30 us longer a
    # message, a third of its processor time (8 ranks, 2 cores).
    def _receive(self, peer: int) -> None:
        self._works.append(self._channel.group.recv([self.received[peer]], peer, self._tag))

    def _send(self, peer: int, parts: list[Tensor]) -> None:
        if parts[peer].numel():
            self._works.append(self._channel.group.send([parts[peer]], peer, self._tag))

    def _collective(self, payload: Tensor) -> dist.Work:
        group, received = self._channel.group, self.received.flatten(0, 1)
        if self._use == "gather":
            return native_all_gather(received, payload, group=group, async_op=True)
        mine = [self.received.shape[1]] * self._channel.ranks
        return dist.all_to_all_single(
            received, payload, mine, self._counts, group=group, async_op=True
        )


def owned(tokens: int, ranks: int) -> list[tuple[int, int]]:
    """The tokens ``[start, stop)`` that each rank sums: equal blocks, the last ones shorter."""
    block = share(tokens, ranks)
    return [(min(r * block, tokens), min((r + 1) * block, tokens)) for r in range(ranks)]


def share(tokens: int, ranks: int) -> int:
    """How many tokens the first rank owns; the last ones may own fewer."""
    return -(-tokens // ranks)


def padded(rows: Tensor, count: int) -> Tensor:
    """`rows` and as many of zeros as make `count`: a gather takes equal parts."""
    missing = count - len(rows)
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def chunk_values(values: int, ranks: int) -> int:
    """Values in a chunk of a message: two chunks where they are large enough to overlap."""
    most = CHUNK_VALUES * ranks
    return min(max(values // 2, most // 2), most)


def chunks(tokens: int, hidden: int, ranks: int) -> list[tuple[int, int]]:
    """Tokens ``[start, stop)`` of each chunk of a message; all but the last divide by `ranks`.

    `ranks` share a chunk; 1 if all of it goes to each rank.
    """
    size = max(chunk_values(tokens * hidden, ranks) // hidden // ranks, 1) * ranks
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def run(pipeline: Iterable[Steps]) -> int:
    """Drive the chunks of a message to their ends.

    In each turn one more chunk starts, and then those before it go one step on, the newest first:
    what they wait for was sent in the turn before, and travelled while the new chunk was encoded. A
    chunk opens its transfers a turn before it starts.

    Args:
        pipeline: The steps of each chunk, in order. A chunk of k transfers is done k turns after
            it started, so k + 2 slots are enough.

    Returns:
        Bytes that this rank sent.
    """
    sent = 0
    waiting = iter(pipeline)
    opened = _open(waiting)
    under_way: list[tuple[Steps, Transfer | None]] = []
    while opened is not None or under_way:
        turn = under_way if opened is None else [(opened, None), *under_way]
        opened = _open(waiting)
        under_way = []
        for steps, transfer in turn:
            if transfer is not None:
                transfer.wait()
            transfer = next(steps, None)
            if transfer is not None:
                sent += transfer.sent_bytes
                under_way.append((steps, transfer))
    return sent


def _open(waiting: Iterator[Steps]) -> Steps | None:
    """The next chunk, its transfers open."""
    steps = next(waiting, None)
    if steps is not None:
        next(steps)
    return steps
