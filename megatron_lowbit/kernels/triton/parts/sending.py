"""Where rows lie in memory that ranks share, whose they are, and how they get there.

The pieces of `symmetric_kernels` between a token's rows and the `barrier`.
"""

import triton
import triton.language as tl


@triton.jit
def as_bytes(address):
    """The bytes at an address of a row or an area."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def send_row(peers, rank, ranks, place, ROW: tl.constexpr, WORDS: tl.constexpr):
    """Copy the row at `place` of this rank's memory to the same place of all others'."""
    word = tl.arange(0, WORDS)
    mask = word < ROW // 4
    tl.debug_barrier()  # all threads have written their bytes of the row
    own = as_bytes(tl.load(peers + rank) + place).to(tl.pointer_type(tl.int32))
    values = tl.load(own + word, mask=mask)
    for step in range(1, ranks):
        peer = (rank + step) % ranks
        theirs = as_bytes(tl.load(peers + peer) + place).to(tl.pointer_type(tl.int32))
        tl.store(theirs + word, values, mask=mask)


@triton.jit
def token_of(place, owner, tokens, chunk, ranks):
    """The token at a place of an owner's share, as `comm.transport` shares chunks; or `tokens`.

    A message is cut into chunks, and each of them into a block for each owner.
    """
    share = tl.cdiv(chunk, ranks)
    start = place // share * chunk
    length = tl.minimum(chunk, tokens - start)
    inside = owner * tl.cdiv(length, ranks) + place % share
    return tl.where(inside < length, start + inside, tokens)
