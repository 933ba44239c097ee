"""The barrier between ranks inside a kernel, over flags in memory that all of them can write.

Program p of every rank tells program p of all ranks how far it is, by an exchange with release
semantics at system scope after a barrier of its own threads; then it reads its own flags, with
acquire semantics, until all have come as far. What was written before `meet` by any thread of any
of these programs is then there to be read.

Flags only grow (modulo 2**32), so nothing has to be reset, and a peer that is already further is
not missed. The atomics are Triton's, whose PTX is ``atom.release.sys`` and ``atom.acquire.sys``:
they run in the interpreter, too, over memory that processes share. Waiting is bounded by a number
of polls, which all threads count alike, and not by a clock, which threads read at different times.
All threads must see what a poll gives: see `select.FIRST_TRITON`.
"""

import triton
import triton.language as tl


@triton.jit
def meet(
    peers,
    rank,
    ranks,
    target,
    polls,
    late,
    PEERS: tl.constexpr,
    TRAP: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Wait until this program has come to `target` on all ranks.

    Args:
        peers: int64 [ranks]: the addresses of every rank's flags, int32 [programs, ranks].
        rank: This rank.
        target: int32, one more than at the last meeting or further.
        polls: How often to look at the flags at most.
        late: int32 [1]: counts the ranks that did not come, unless TRAP.
        PEERS: A power of two, at least `ranks`.
        TRAP: Whether such a rank ends the kernel with an error.
        NATIVE: Compiled, not interpreted.
    """
    peer = tl.arange(0, PEERS)
    mask = peer < ranks
    row = tl.program_id(0) * ranks
    theirs = tl.load(peers + peer, mask=mask, other=0) + 4 * (row + rank)
    own = tl.load(peers + rank) + 4 * (row + peer)
    theirs = theirs.to(tl.pointer_type(tl.int32))
    own = own.to(tl.pointer_type(tl.int32))
    told = tl.zeros([PEERS], tl.int32) + target
    tl.debug_barrier()  # all threads have written what the peers are to read
    tl.atomic_xchg(theirs, told, mask=mask, sem="release", scope="sys")
    missing = ranks
    left = tl.cast(polls, tl.int64)
    while (missing > 0) & (left > 0):
        seen = tl.atomic_add(own, tl.zeros([PEERS], tl.int32), mask, sem="acquire", scope="sys")
        missing = tl.sum((mask & (seen - told < 0)).to(tl.int32), axis=0)
        left -= 1
    tl.debug_barrier()  # no thread reads before all have seen it
    if TRAP:
        _give_up(missing, NATIVE)
    else:
        tl.atomic_add(late, missing)


@triton.jit
def _give_up(missing, NATIVE: tl.constexpr):
    """End the kernel with an error (a launch failure, on the host) if any rank is missing.

    For a rank that died: its peers must not wait for ever, and no result of theirs is right.
    """
    if NATIVE:
        if missing > 0:
            tl.inline_asm_elementwise(
                "trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
            )
    else:
        assert missing == 0, "a rank did not come in time"
