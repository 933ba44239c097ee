"""Moving payload rows between ranks: buffers, the two primitives, and the pipeline over chunks.

A collective is written as a generator of *steps* for one chunk of tokens: it encodes, yields a
transfer that is under way, goes on when its bytes have come, and so on to the end. `run` drives the
chunks of a message so that while one chunk's bytes travel another is encoded or decoded, as far as
the backend works in the background (Gloo: its two threads; NCCL: its own stream). The order
of transfers depends on the number of chunks alone, so it is the same on every rank.

Workspace: received bytes land in buffers that are kept per group, allocated once per slot and size
class (powers of two) and used again by every later call. At most `SLOTS` chunks are under way and
no chunk is larger than `CHUNK_VALUES` values, which bounds them whatever the message size (README,
"Memory").
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

Steps = Generator["Transfer", None, None]

# Values in a chunk.
CHUNK_VALUES = 1 << 18

# torch 2.13 renames these and warns where the old names are used.
native_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
native_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_workspaces: WeakKeyDictionary[dist.ProcessGroup, dict] = WeakKeyDictionary()


@dataclass
class Transfer:
    """Bytes that are under way; `wait` before what was received is read.

    Attributes:
        works: What the backend does.
        sent_bytes: Bytes that this rank sends to others.
        source: What the backend reads until the works are done.
    """

    works: list[dist.Work]
    sent_bytes: int
    source: object = field(repr=False)

    def wait(self) -> None:
        """Until all bytes have come and gone."""
        for work in self.works:
            work.wait()


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

    def rows(self, use: str, count: int, row_bytes: int, device: torch.device) -> Tensor:
        """A buffer ``uint8 [count, row_bytes]`` of the workspace; `use` tells buffers apart."""
        needed = count * row_bytes
        size_class = 1 << max(needed - 1, 0).bit_length()
        key = (use, self.slot, size_class, device)
        buffers = _workspaces.setdefault(self.group, {})
        if key not in buffers:
            buffers[key] = torch.empty(size_class, dtype=torch.uint8, device=device)
        return buffers[key][:needed].view(count, row_bytes)

    def gather(self, payload: Tensor, use: str) -> tuple[Transfer, Tensor]:
        """Send ``uint8 [rows, row_bytes]`` to all, as many rows on every rank.

        Returns:
            The transfer, and where it puts ``uint8 [ranks * rows, row_bytes]``.
        """
        rows, row_bytes = payload.shape
        received = self.rows(use, self.ranks * rows, row_bytes, payload.device)
        parts = list(received.view(self.ranks, rows, row_bytes))
        if self._by_pairs():
            return self._swap([payload] * self.ranks, parts), received
        work = native_all_gather(received, payload, group=self.group, async_op=True)
        return Transfer([work], (self.ranks - 1) * payload.numel(), payload), received

    def exchange(self, payload: Tensor, use: str) -> tuple[Transfer, Tensor]:
        """Send each rank its rows (`owned`) of ``uint8 [tokens, row_bytes]``.

        Returns:
            The transfer, and where it puts ``uint8 [ranks, own rows, row_bytes]``.
        """
        tokens, row_bytes = payload.shape
        spans = owned(tokens, self.ranks)
        counts = [stop - start for start, stop in spans]
        mine = counts[self.rank]
        received = self.rows(use, self.ranks * mine, row_bytes, payload.device)
        parts = received.view(self.ranks, mine, row_bytes)
        if self._by_pairs():
            return self._swap([payload[a:b] for a, b in spans], list(parts)), parts
        work = dist.all_to_all_single(
            received, payload, [mine] * self.ranks, counts, group=self.group, async_op=True
        )
        return Transfer([work], (tokens - mine) * row_bytes, payload), parts

    def _by_pairs(self) -> bool:
        # Gloo's all-to-all posts its sends before its receives and often uses one direction of a
        # link at a time (4 MB, 2 ranks, 1 Gbit/s: 33 ms, pairs with the receives first 17 ms), and
        # its all-gather is a ring of ranks - 1 steps (1 MB, 8 ranks, 1 Gbit/s: 13.7 ms, 10.4 ms).
        return "gloo" in str(dist.get_backend(self.group))

    def _swap(self, to_send: list[Tensor], received: list[Tensor]) -> Transfer:
        """Send ``to_send[r]`` to each rank r and put what comes from it into ``received[r]``."""
        ranks, rank, works, sent = self.ranks, self.rank, [], 0
        for step in range(1, ranks):
            peer = (rank - step) % ranks
            if received[peer].numel():
                works.append(dist.irecv(received[peer], group=self.group, group_src=peer))
        for step in range(1, ranks):
            peer = (rank + step) % ranks
            if to_send[peer].numel():
                works.append(dist.isend(to_send[peer], group=self.group, group_dst=peer))
                sent += to_send[peer].numel()
        received[rank].copy_(to_send[rank])
        return Transfer(works, sent, to_send)


def owned(tokens: int, ranks: int) -> list[tuple[int, int]]:
    """The tokens ``[start, stop)`` that each rank sums: equal blocks, the last ones shorter."""
    block = -(-tokens // ranks)
    return [(min(r * block, tokens), min((r + 1) * block, tokens)) for r in range(ranks)]


def equal_rows(rows: Tensor, tokens: int, ranks: int) -> Tensor:
    """Rows of a rank's own tokens, as many as the first rank owns: all-gathers send equal parts."""
    missing = -(-tokens // ranks) - len(rows)
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def chunks(tokens: int, hidden: int, ranks: int) -> list[tuple[int, int]]:
    """Tokens ``[start, stop)`` of each chunk of a message; all but the last divide by `ranks`."""
    size = max(CHUNK_VALUES // hidden // ranks, 1) * ranks
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def run(pipeline: Iterable[Steps]) -> int:
    """Drive the chunks of a message to their ends.

    In each turn one more chunk starts, and then those before it go one step on, the newest first:
    what they wait for was sent in the turn before, and travelled while the new chunk was encoded.

    Args:
        pipeline: The steps of each chunk, in order. A chunk of k transfers is done k turns after
            it started, so k + 1 slots are enough.

    Returns:
        Bytes that this rank sent.
    """
    sent = 0
    waiting = iter(pipeline)
    under_way: list[tuple[Steps, Transfer | None]] = []
    while True:
        fresh = next(waiting, None)
        turn = under_way if fresh is None else [(fresh, None), *under_way]
        if not turn:
            return sent
        under_way = []
        for steps, transfer in turn:
            if transfer is not None:
                transfer.wait()
            transfer = next(steps, None)
            if transfer is not None:
                sent += transfer.sent_bytes
                under_way.append((steps, transfer))
