"""Memory that all ranks of a group can write: how the kernels of `symmetric` lay it out.

Every rank has one block of `size` bytes on its GPU and the addresses of all blocks. A block begins
with flags (int32, ``[PROGRAMS, ranks]``: program p of rank r writes flag (p, r) of every rank); two
halves follow, which calls use in turn. A rank gets through a call only when all ranks have begun
it, and so have ended the one before: what a call writes into a half is no longer read by the call
that used it last, and no call waits at its end for its readers. The GPU itself counts the calls, so
a CUDA graph may be replayed any number of times.

Rows lie `row_stride` bytes apart. In a half one-shot has ``[ranks, tokens]`` rows; two-shot has
``[ranks, share]`` rows of partials and then ``[ranks * share]`` rows of sums, where the share is
that of `comm.transport`.
"""

from dataclasses import dataclass

from torch import Tensor

# Programs of a kernel, the same on all ranks: as all of them wait for their peers they must all run
# at once. Any GPU with so many multiprocessors holds one on each.
PROGRAMS = 32
# What a look at the flags is taken to last. Not measured: about what a system-wide atomic on a
# GPU's own memory takes.
POLL_SECONDS = 1e-6
_ALIGNED = 16  # bytes: of rows and areas, so that they are copied in wide pieces


@dataclass(frozen=True)
class PeerMemory:
    """One rank's view of the memory of its group.

    Attributes:
        peers: int64 ``[ranks]`` on the GPU: the address of every rank's block, this one's included.
            Their flags are zero before any rank writes one.
        calls: int32 ``[PROGRAMS]`` on the GPU, zero at first: calls that each program has ended.
        late: int32 ``[1]`` on the GPU, zero at first: counts programs that gave up waiting.
        rank: This rank.
        size: Bytes of every rank's block.
        seconds: How long a program waits for its peers, about.
    """

    peers: Tensor
    calls: Tensor
    late: Tensor
    rank: int
    size: int
    seconds: float

    @property
    def ranks(self) -> int:
        return self.peers.numel()

    @property
    def flag_bytes(self) -> int:
        """Where the first half begins."""
        return _aligned(4 * self.calls.numel() * self.ranks)

    @property
    def half_bytes(self) -> int:
        return (self.size - self.flag_bytes) // 2 // _ALIGNED * _ALIGNED

    def holds(self, collective: str, tokens: int, row_bytes: int, sum_row_bytes: int) -> bool:
        """Whether a message of so many tokens fits, by ``one-shot`` or ``two-shot``.

        Args:
            collective: One of the two.
            tokens: Of the message.
            row_bytes: Of the payload's rows.
            sum_row_bytes: Of the rows of sums, which two-shot sends.
        """
        rows = self.ranks * tokens * row_stride(row_bytes)
        if collective == "two-shot":
            share = -(-tokens // self.ranks)
            rows = self.ranks * share * (row_stride(row_bytes) + row_stride(sum_row_bytes))
        return rows <= self.half_bytes


def row_stride(row_bytes: int) -> int:
    """Bytes from a row to the next."""
    return _aligned(row_bytes)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED
