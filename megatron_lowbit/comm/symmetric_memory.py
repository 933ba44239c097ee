"""All-reduces of short messages over memory that the GPUs of a node share, in one kernel each.

torch's symmetric memory gives every rank the addresses of all ranks' blocks; the kernels of
`kernels.triton.symmetric` write rows there and sum what the peers wrote, without a collective of
the backend. One-shot and two-shot give the same bits as over torch.distributed, so the way that a
message takes is nothing that anyone sees but in time; messages that a block does not hold, codecs
without such kernels and groups without such memory go over torch.distributed.

Opening it is a collective step, at load: either all ranks of a group go this way or none, and what
kept them from it is remembered. A short trial is part of it, against the collectives themselves.
"""

import itertools
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import DEFAULT_CODEC, Codec, Tables, get_codec
from megatron_lowbit.codecs.carry import NO_CARRY, Carry
from megatron_lowbit.comm.agreement import gather_values
from megatron_lowbit.comm.one_shot import one_shot
from megatron_lowbit.comm.transport import chunks, owned
from megatron_lowbit.comm.two_shot import two_shot
from megatron_lowbit.kernels import select
from megatron_lowbit.kernels.peer_memory import PROGRAMS, PeerMemory

# Of every rank's block: at 8 ranks, 4 bits and hidden 8192 it holds 123 tokens by one-shot and 488
# by two-shot; longer messages are not ruled by latency.
BLOCK_BYTES = 1 << 23
_TRIAL_SECONDS = 20.0
_TRIAL_HIDDEN = 4096  # as in models: a program has several warps
_TRIAL_KEPT = 32
_STEPS = {"one-shot": one_shot, "two-shot": two_shot}


@dataclass(frozen=True)
class SymmetricMemory:
    """What a group has: the memory, or why there is none.

    Attributes:
        memory: Of this rank; None if there is none.
        reason: Why not; empty if there is.
        group: Gives the group whose memory it is, while there is one.
        keeps: What must live as long as `memory`.
    """

    memory: PeerMemory | None
    reason: str = ""
    group: Callable[[], dist.ProcessGroup | None] = lambda: None
    keeps: object = None

    def takes(
        self,
        collective: str,
        partial: Tensor,
        codec: Codec,
        tables: Tables,
        group: dist.ProcessGroup,
    ) -> bool:
        """Whether an all-reduce of `partial` over `group` goes this way: on all ranks alike."""
        memory = self.memory
        if memory is None or not codec.takes_symmetric_memory or group is not self.group():
            return False
        rows = codec.row_bytes(tables), _sum_row(codec, tables)
        return memory.holds(collective, len(partial), *rows)

    def status(self, codec: Codec) -> str:
        """``on``, or ``off: `` and why, for a sync point of this codec."""
        if self.memory is None:
            return f"off: {self.reason}"
        if not codec.takes_symmetric_memory:
            return f"off: {codec.name} has no kernels for it"
        return "on"

    def all_reduce(
        self,
        collective: str,
        partial: Tensor,
        codec: Codec,
        tables: Tables,
        out: Tensor,
        carry: Carry = NO_CARRY,
        of_sum: Carry = NO_CARRY,
    ) -> int:
        """Sum `partial` over the group.

        Args:
            collective: ``one-shot`` or ``two-shot``.
            partial: Floating point ``[tokens, hidden]`` that `takes` has agreed to.
            codec: The same on every rank.
            tables: Of this sync point.
            out: Floating point ``[tokens, hidden]``; may be `partial`.
            carry: As for `comm.one_shot`.
            of_sum: As for `comm.two_shot`.

        Returns:
            The bytes that this rank sent.
        """
        memory, tokens = self.memory, len(partial)
        assert memory is not None, "`takes` has agreed"
        others, row = memory.ranks - 1, codec.row_bytes(tables)
        if collective != "two-shot":
            codec.all_reduce_in(memory, partial, tables, chunk=0, out=out, carry=carry)
            return others * tokens * row
        spans = chunks(tokens, tables.hidden, memory.ranks)
        chunk = spans[0][1] if spans else 1
        codec.all_reduce_in(
            memory, partial, tables, chunk=chunk, out=out, carry=carry, of_sum=of_sum
        )
        blocks = (owned(b - a, memory.ranks)[memory.rank] for a, b in spans)
        mine = sum(stop - start for start, stop in blocks)
        return (tokens - mine) * row + others * mine * _sum_row(codec, tables)


# Of policies that are made for one call, without asking the group.
NOT_OPENED = SymmetricMemory(None, "not asked for")


def open_symmetric_memory(group: dist.ProcessGroup, device: torch.device) -> SymmetricMemory:
    """The memory of a group, opened at the first call; call it on every rank of the group alike.

    Args:
        group: Ranks with a GPU each.
        device: Where the partials are.
    """
    if device.type != "cuda":
        return SymmetricMemory(None, f"tensors are on {device.type}")
    if group not in _opened:
        _opened[group] = _open(group, device)
    return _opened[group]


_opened: WeakKeyDictionary[dist.ProcessGroup, SymmetricMemory] = WeakKeyDictionary()


def _open(group: dist.ProcessGroup, device: torch.device) -> SymmetricMemory:
    if obstacle := _first(_obstacle(device), group):
        return SymmetricMemory(None, obstacle)
    if len(set(gather_values(socket.gethostname(), group=group))) > 1:
        return SymmetricMemory(None, "the ranks are on several machines")
    steps = _Opening(group, device)
    for step in (steps.allocate, steps.exchange):
        if failure := _first(_attempt(step), group):
            return SymmetricMemory(None, f"torch has no symmetric memory here ({failure})")
    opened = steps.opened
    assert opened is not None, "both steps have been made"
    if failure := _try_out(opened, group, device):
        warnings.warn(
            f"megatron_lowbit: no all-reduce over symmetric memory ({failure}): short messages go "
            "over torch.distributed, with the same bits.",
            RuntimeWarning,
            stacklevel=2,
        )
        return SymmetricMemory(None, f"its trial failed ({failure})")
    return opened


def _obstacle(device: torch.device) -> str:
    """What this rank lacks; empty if nothing."""
    if (described := select.describe("cuda")).startswith("none: "):
        return f"no GPU kernels ({described.removeprefix('none: ')})"
    try:
        import torch.distributed._symmetric_memory  # noqa: F401
    except ImportError as error:
        return f"torch {torch.__version__} has no symmetric memory ({_words(error)})"
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if processors < PROGRAMS:
        return f"the GPU has {processors} multiprocessors, the kernels wait on {PROGRAMS} at once"
    return ""


class _Opening:
    """The steps that make a group's memory; ranks agree on each before the next."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self._group, self._device = group, device
        self._block: Tensor | None = None
        self.opened: SymmetricMemory | None = None

    def allocate(self) -> None:
        """This rank's block, zero before any peer has its address."""
        from torch.distributed import _symmetric_memory

        self._block = _symmetric_memory.empty(BLOCK_BYTES, dtype=torch.uint8, device=self._device)
        self._block.zero_()
        torch.cuda.synchronize(self._device)

    def exchange(self) -> None:
        """The addresses of all ranks' blocks; waits for them."""
        from torch.distributed import _symmetric_memory

        group, device = self._group, self._device
        assert self._block is not None, "`allocate` comes first"
        handle = _symmetric_memory.rendezvous(self._block, group)
        rank = dist.get_rank(group)
        # The handle's addresses are those of allocations, in which a block may lie anywhere; it
        # lies at the same place on all ranks, as all have allocated alike.
        offset = self._block.data_ptr() - handle.buffer_ptrs[rank]
        addresses = [address + offset for address in handle.buffer_ptrs]
        memory = PeerMemory(
            peers=torch.tensor(addresses, dtype=torch.int64, device=device),
            calls=torch.zeros(PROGRAMS, dtype=torch.int32, device=device),
            late=torch.zeros(1, dtype=torch.int32, device=device),
            rank=rank,
            size=BLOCK_BYTES,
            seconds=group._get_backend(device).options._timeout.total_seconds(),
        )
        self.opened = SymmetricMemory(memory, group=ref(group), keeps=(self._block, handle))


def _try_out(opened: SymmetricMemory, group: dist.ProcessGroup, device: torch.device) -> str:
    """What is wrong, on any rank, with three calls of each kind: one more than there are halves."""
    codec = get_codec(DEFAULT_CODEC)
    index = torch.arange(_TRIAL_KEPT)
    tables = codec.tables(_TRIAL_HIDDEN, bf16_index=index, device=device)
    assert opened.memory is not None
    memory = replace(opened.memory, seconds=_TRIAL_SECONDS)
    generator = torch.Generator().manual_seed(dist.get_rank(group))
    sizes = (1, 2 * memory.calls.numel() + 1, 3)
    for tokens, (name, step) in itertools.product(sizes, _STEPS.items()):
        partial = torch.randn(tokens, _TRIAL_HIDDEN, generator=generator).to(device, torch.bfloat16)
        expected = torch.empty_like(partial)
        step(partial, tables, codec=codec, group=group, out=expected)
        call = {"chunk": tokens * (name == "two-shot"), "out": partial, "trap": False}

        def compare(partial=partial, expected=expected, call=call, name=name) -> None:
            codec.all_reduce_in(memory, partial, tables, **call)
            if memory.late.item():
                raise RuntimeError(f"a rank did not come within {_TRIAL_SECONDS:.0f} s")
            if not torch.equal(partial, expected):
                raise RuntimeError(f"other bits in {name} of {len(partial)} tokens")

        if failure := _first(_attempt(compare), group):
            return failure
    return ""


def _attempt(step: Callable[[], None]) -> str:
    """How `step` failed on this rank; empty if it did not."""
    try:
        step()
    except Exception as error:  # whatever torch, Triton, the driver or the topology raise
        return _words(error)
    return ""


def _sum_row(codec: Codec, tables: Tables) -> int:
    return codec.for_sum().row_bytes(tables.of_sum or tables)


def _first(failure: str, group: dist.ProcessGroup) -> str:
    """The first rank's failure; empty if none has one."""
    return next(filter(None, gather_values(failure, group=group)), "")


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
