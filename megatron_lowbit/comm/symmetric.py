"""All-reduces of short messages over memory that the GPUs of a node share, in one kernel each.

torch's symmetric memory gives every rank the addresses of all ranks' blocks; the kernels of
`kernels.triton_symmetric` write rows there and sum what the peers wrote, without a collective of
the backend. One-shot and two-shot give the same bits as over torch.distributed, so the way that a
message takes is nothing that anyone sees but in time; messages that a block does not hold, codecs
without such kernels and groups without such memory go over torch.distributed.

Opening it is a collective step, at load: either all ranks of a group go this way or none, and what
kept them from it is remembered. A short trial is part of it, against the collectives themselves.
"""

import itertools
import socket
import warnings
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import DEFAULT_CODEC, Codec, Tables, get_codec
from megatron_lowbit.comm.agreement import gather_values
from megatron_lowbit.comm.one_shot import one_shot
from megatron_lowbit.comm.transport import owned
from megatron_lowbit.comm.two_shot import two_shot
from megatron_lowbit.kernels import select
from megatron_lowbit.kernels.peer_memory import PROGRAMS, PeerMemory

# Of every rank's block: at 8 ranks, 4 bits and hidden 8192 it holds 123 tokens by one-shot and 488
# by two-shot; longer messages are not ruled by latency.
BLOCK_BYTES = 1 << 23
_TRIAL_SECONDS = 20.0
_TRIAL_HIDDEN = 64
_STEPS = {"one-shot": one_shot, "two-shot": two_shot}


@dataclass(frozen=True)
class Symmetric:
    """What a group has: the memory, or why there is none.

    Attributes:
        memory: Of this rank; None if there is none.
        reason: Why not; empty if there is.
        keeps: What must live as long as `memory`.
    """

    memory: PeerMemory | None
    reason: str = ""
    keeps: object = None

    def takes(self, collective: str, partial: Tensor, codec: Codec, tables: Tables) -> bool:
        """Whether an all-reduce of `partial` goes this way: on all ranks alike."""
        if self.memory is None or codec.symmetric_kernels(partial, tables) is None:
            return False
        rows = codec.row_bytes(tables), _sum_row(codec, tables)
        return self.memory.holds(collective, len(partial), *rows)

    def status(self, codec: Codec, tables: Tables) -> str:
        """``on``, or ``off: `` and why, for a sync point of this codec."""
        if self.memory is None:
            return f"off: {self.reason}"
        if codec.symmetric_kernels(tables.bf16_index, tables) is None:
            return f"off: {codec.name} has no kernels for it"
        return "on"

    def all_reduce(
        self, collective: str, partial: Tensor, codec: Codec, tables: Tables, out: Tensor
    ) -> int:
        """Sum `partial` over the group.

        Args:
            collective: ``one-shot`` or ``two-shot``.
            partial: Floating point ``[tokens, hidden]`` that `takes` has agreed to.
            codec: The same on every rank.
            tables: Of this sync point.
            out: Floating point ``[tokens, hidden]``; may be `partial`.

        Returns:
            The bytes that this rank sent.
        """
        memory, is_two_shot = self.memory, collective == "two-shot"
        codec.all_reduce_in(memory, partial, tables, two_shot=is_two_shot, out=out)
        tokens, others, row = len(partial), memory.ranks - 1, codec.row_bytes(tables)
        if not is_two_shot:
            return others * tokens * row
        start, stop = owned(tokens, memory.ranks)[memory.rank]
        mine = stop - start
        return (tokens - mine) * row + others * mine * _sum_row(codec, tables)


# Of choosers that are made for one call, without asking the group.
NOT_OPENED = Symmetric(None, "not asked for")


def open_symmetric(group: dist.ProcessGroup, device: torch.device) -> Symmetric:
    """The memory of a group, opened at the first call; call it on every rank of the group alike.

    Args:
        group: Ranks with a GPU each.
        device: Where the partials are.
    """
    if device.type != "cuda":
        return Symmetric(None, f"tensors are on {device.type}")
    if group not in _opened:
        _opened[group] = _open(group, device)
    return _opened[group]


_opened: WeakKeyDictionary[dist.ProcessGroup, Symmetric] = WeakKeyDictionary()


def _open(group: dist.ProcessGroup, device: torch.device) -> Symmetric:
    if obstacle := _first(_obstacle(device), group):
        return Symmetric(None, obstacle)
    if len(set(gather_values(socket.gethostname(), group=group))) > 1:
        return Symmetric(None, "the ranks are on several machines")
    opened, failure = None, ""
    try:
        opened = _allocate(group, device)
    except Exception as error:  # whatever torch, the driver or the topology raise
        failure = _words(error)
    if failure := _first(failure, group):
        return Symmetric(None, f"torch has no symmetric memory here ({failure})")
    if failure := _first(_try_out(opened, group, device), group):
        warnings.warn(
            f"megatron_lowbit: no all-reduce over symmetric memory ({failure}): short messages go "
            "over torch.distributed, with the same bits.",
            RuntimeWarning,
            stacklevel=2,
        )
        return Symmetric(None, f"its trial failed ({failure})")
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


def _allocate(group: dist.ProcessGroup, device: torch.device) -> Symmetric:
    from torch.distributed import _symmetric_memory

    block = _symmetric_memory.empty(BLOCK_BYTES, dtype=torch.uint8, device=device)
    block.zero_()
    torch.cuda.synchronize(device)  # zero before any peer has the address
    handle = _symmetric_memory.rendezvous(block, group)
    memory = PeerMemory(
        peers=torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device),
        calls=torch.zeros(PROGRAMS, dtype=torch.int32, device=device),
        late=torch.zeros(1, dtype=torch.int32, device=device),
        rank=dist.get_rank(group),
        size=BLOCK_BYTES,
        seconds=group._get_backend(device).options._timeout.total_seconds(),
    )
    return Symmetric(memory, keeps=(block, handle))


def _try_out(opened: Symmetric, group: dist.ProcessGroup, device: torch.device) -> str:
    """What is wrong, on any rank, with three calls of each kind: one more than there are halves."""
    codec = get_codec(DEFAULT_CODEC)
    tables = codec.tables(_TRIAL_HIDDEN, device=device)
    memory = replace(opened.memory, seconds=_TRIAL_SECONDS)
    generator = torch.Generator().manual_seed(dist.get_rank(group))
    sizes = (1, 2 * memory.calls.numel() + 1, 3)
    for tokens, (name, step) in itertools.product(sizes, _STEPS.items()):
        partial = torch.randn(tokens, _TRIAL_HIDDEN, generator=generator).to(device)
        expected, got = torch.empty_like(partial), torch.empty_like(partial)
        step(partial, tables, codec=codec, group=group, out=expected)
        is_two_shot = name == "two-shot"
        codec.all_reduce_in(memory, partial, tables, two_shot=is_two_shot, out=got, trap=False)
        failure = ""
        if memory.late.item():
            failure = f"a rank did not come within {_TRIAL_SECONDS:.0f} s"
        elif not torch.equal(got, expected):
            failure = f"other bits in {name} of {tokens} tokens"
        if failure := _first(failure, group):
            return failure
    return ""


def _sum_row(codec: Codec, tables: Tables) -> int:
    return codec.for_sum().row_bytes(tables.of_sum or tables)


def _first(failure: str, group: dist.ProcessGroup) -> str:
    """The first rank's failure; empty if none has one."""
    return next(filter(None, gather_values(failure, group=group)), "")


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
