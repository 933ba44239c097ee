"""The low-bit collectives on tensors: any shape, any float dtype, differentiable, with accounting.

Contract, for every codec and collective (README, "What it promises"): all ranks end with the same
bits; sums are fp32 in rank order; any number of tokens, zero included; the output has the input's
dtype; a NaN or infinity in a token gives NaN in that token alone; the backward pass is that of
Megatron's function in the same place (`megatron/core/tensor_parallel/mappings.py`): the identity
for the all-reduce, an all-gather for the reduce-scatter, a reduce-scatter for the all-gather.
"""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import DEFAULT_CODEC, Codec, Tables, get_codec
from megatron_lowbit.comm import sequence, transport
from megatron_lowbit.comm.choice import Chooser, Settings
from megatron_lowbit.comm.hierarchical import hierarchical
from megatron_lowbit.comm.one_shot import one_shot
from megatron_lowbit.comm.traffic import Choice, Clock, Counters, Traffic
from megatron_lowbit.comm.two_shot import two_shot
from megatron_lowbit.errors import LowbitError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN = ("native", "one-shot", "two-shot")


def all_reduce(
    x: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    codec: str | Codec = DEFAULT_CODEC,
    tables: Tables | None = None,
    collective: str | Chooser = "one-shot",
    traffic: Traffic | None = None,
    in_place: bool = False,
) -> Tensor:
    """Sum `x` over the ranks of `group` with low-bit payloads on the wire.

    Args:
        x: bf16, fp16 or fp32 ``[..., hidden]``, of the same shape on every rank.
        group: The process group; the default group if left out. With one rank nothing is sent and
            `x` itself is returned, as Megatron does.
        codec: A codec, or its name (`megatron_lowbit.get_codec` for other bits).
        tables: What calibration knows of this tensor (`codec.tables`). Left out: no feature
            travels in BF16, which codecs with calibrated ranges refuse.
        collective: ``native``, ``one-shot`` or ``two-shot``; a `Chooser` made once
            (`comm.choice.make_chooser`) for ``hierarchical`` and ``auto``.
        traffic: Counters to add this call to.
        in_place: Put the sum into `x`, as Megatron's own does (64 MB over 1 Gbit/s, 4 ranks: the
            page faults of a new tensor cost 4 % of the time). An `x` that is strided, or whose
            gradient autograd records, is left alone all the same.

    Returns:
        The sum, of `x`'s shape and dtype, bit-identical on all ranks.

    Raises:
        LowbitError: Unsupported dtype, no feature dimension, unknown codec or collective, or tables
            of another codec, hidden size or number of ranks.
    """
    if in_place and isinstance(collective, Chooser) and not _records(x):
        choice = collective.all_reduce(x.numel())
        if choice.collective == "native" and x.is_contiguous():
            return _native(x, group, choice, traffic)
    call = _Call(x, group, codec, tables, collective, traffic)
    whole = call.tables.folded_index is None and x.is_contiguous()
    call.in_place = in_place and whole and not _records(x)
    return x if call.ranks == 1 else _run(_AllReduce, x, call)


def reduce_scatter(
    x: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    codec: str | Codec = DEFAULT_CODEC,
    tables: Tables | None = None,
    collective: str | Chooser = "one-shot",
    traffic: Traffic | None = None,
    counts: list[int] | None = None,
) -> Tensor:
    """Sum `x` over the ranks of `group`; each rank gets its share of the first axis.

    Args:
        x: bf16, fp16 or fp32 ``[sequence, ..., hidden]``, of the same shape on every rank; the
            number of ranks divides `sequence`, if `counts` is left out.
        group: As for `all_reduce`.
        codec: As for `all_reduce`.
        tables: As for `all_reduce`.
        collective: ``native``: the backend's own. Any other: in low bits, quantized once.
        traffic: Counters to add this call to.
        counts: How much of the first axis each rank gets, the same on every rank; equal shares if
            left out. Only in low bits.

    Returns:
        ``[sequence / ranks, ..., hidden]`` (or ``[counts[rank], ...]``) of `x`'s dtype: this rank's
        block of the sum.

    Raises:
        LowbitError: As `all_reduce`, or the ranks do not divide `sequence`, or `counts` is not one
            count a rank that together make `sequence`.
    """
    call = _Call(x, group, codec, tables, collective, traffic)
    if x.ndim < 2 or (counts is None and x.shape[0] % call.ranks):
        raise LowbitError(
            f"reduce_scatter needs [sequence, ..., hidden] with a sequence that {call.ranks} ranks "
            f"divide, got {tuple(x.shape)}"
        )
    call.counts = [x.shape[0] // call.ranks] * call.ranks if counts is None else counts
    if len(call.counts) != call.ranks or sum(call.counts) != x.shape[0]:
        raise LowbitError(
            f"counts {call.counts} do not split {x.shape[0]} tokens over {call.ranks} ranks"
        )
    return x if call.ranks == 1 else _run(_ReduceScatter, x, call)


def all_gather(
    x: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    codec: str | Codec = DEFAULT_CODEC,
    tables: Tables | None = None,
    traffic: Traffic | None = None,
) -> Tensor:
    """Put the `x` of all ranks together along the first axis, with low-bit payloads on the wire.

    Args:
        x: bf16, fp16 or fp32 ``[sequence / ranks, ..., hidden]``, of the same shape on every rank.
        group: As for `all_reduce`.
        codec: As for `all_reduce`.
        tables: As for `all_reduce`.
        traffic: Counters to add this call to.

    Returns:
        ``[sequence, ..., hidden]`` of `x`'s dtype, bit-identical on all ranks.

    Raises:
        LowbitError: As `all_reduce`.
    """
    call = _Call(x, group, codec, tables, "one-shot", traffic)
    return x if call.ranks == 1 else _run(_AllGather, x, call)


class _Call:
    """One call's arguments, checked: every error comes before any rank sends, on all alike."""

    def __init__(self, x, group, codec, tables, collective, traffic):
        self.codec = get_codec(codec) if isinstance(codec, str) else codec
        self.group = group or dist.group.WORLD
        self.ranks = dist.get_world_size(self.group)
        _check_input(x)
        if tables is None:
            tables = self.codec.tables(x.shape[-1], device=x.device)
        _check_tables(tables, self.codec, x.shape[-1], self.ranks)
        self.tables, self.traffic, self.in_place = tables, traffic, False
        self.chooser = collective
        if isinstance(collective, str):
            if collective not in _PLAIN:
                Settings(collective)  # an unknown one is named
                raise LowbitError(f"{collective} needs comm.choice.make_chooser, once for a group")
            self.chooser = Chooser(collective)
        if tables.folded_index is not None:
            self._check_folded(x)

    def _check_folded(self, x: Tensor) -> None:
        if self.chooser.mode not in ("one-shot", "two-shot"):
            raise LowbitError(
                f"a folded weight's partials are rotated, which {self.chooser.mode} does not undo: "
                "choose one-shot or two-shot"
            )
        if _records(x):
            raise LowbitError("a folded weight serves inference only: its partial wants gradients")

    def output(self, x: Tensor) -> Tensor:
        """Where the sum goes: a partial whose weight has rotated it is wider than its sum."""
        return x.new_empty(*x.shape[:-1], self.tables.hidden)

    def count(self, choice: Choice, x: Tensor, payload: int, sent: int, clock: Clock) -> None:
        if self.traffic is not None:
            tokens = x.numel() // x.shape[-1]
            counters = Counters(1, tokens, tokens * self.tables.hidden, payload, sent)
            self.traffic.add(choice, counters, clock.stop())

    def payload_bytes(self, collective: str, tokens: int) -> int:
        """Bytes of `tokens` in the form they travel in; the mean of two where a sum is sent."""
        first = self.codec.row_bytes(self.tables)
        nodes = self.chooser.nodes
        sums = collective == "two-shot" or (collective == "hierarchical" and nodes.count > 2)
        if not sums:
            return tokens * first
        second = self.codec.for_sum().row_bytes(self.codec.sum_tables(self.tables))
        return tokens * (first + second) // 2


def _run(function: type[torch.autograd.Function], x: Tensor, call: _Call) -> Tensor:
    if _records(x):
        return function.apply(x, call)
    return function.forward(None, x, call)  # without autograd's 5 us a call


def _records(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _check_input(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise LowbitError(f"cannot send {x.dtype} in low bits: supported are {supported}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise LowbitError(f"low bits need [..., hidden], got shape {tuple(x.shape)}")


def _check_tables(tables: Tables, codec: Codec, hidden: int, ranks: int) -> None:
    if tables.codec != codec.name:
        raise LowbitError(f"tables are of codec {tables.codec}, the codec is {codec.name}")
    if tables.width != hidden:
        raise LowbitError(f"tables are for hidden size {tables.width}, the tensor has {hidden}")
    for by_rank in (tables.scale, tables.center):
        if by_rank is not None and len(by_rank) != ranks:
            raise LowbitError(f"tables are for {len(by_rank)} ranks, the group has {ranks}")


class _AllReduce(torch.autograd.Function):
    """The sum over ranks; every rank's gradient is the gradient of the sum."""

    @staticmethod
    def forward(ctx, x, call):
        choice = call.chooser.all_reduce(x.numel())
        if choice.collective == "native":
            out = x if call.in_place else x.clone(memory_format=torch.contiguous_format)
            return _native(out, call.group, choice, call.traffic)
        clock, partial = Clock(x.device), x.reshape(-1, x.shape[-1])
        # In place too: a chunk's sum is written after its partial was encoded.
        out = x if call.in_place else call.output(x)
        choice, sent = _send(choice, partial, call, out.view(len(partial), call.tables.hidden))
        payload = call.payload_bytes(choice.collective, len(partial))
        call.count(choice, x, payload, sent, clock)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _native(x: Tensor, group, choice: Choice, traffic: Traffic | None) -> Tensor:
    """The backend's own sum, in place, with as little as possible around it.

    That little is cold when a rank has waited for its turn: 8 KB, 2 ranks, 2 cores take 0.38 ms, of
    which 3 us of Python, measured in a loop, were 20.
    """
    group = group or dist.group.WORLD
    ranks = group.size()
    if ranks == 1:
        return x
    if traffic is None:
        dist.all_reduce(x, group=group)
        return x
    clock = Clock(x.device)
    dist.all_reduce(x, group=group)
    clock.stop()
    size, tokens = x.numel() * x.element_size(), x.numel() // x.shape[-1]
    sent = 2 * size * (ranks - 1) // ranks
    traffic.add(choice, Counters(1, tokens, x.numel(), size, sent), clock)
    return x


def _send(choice: Choice, partial: Tensor, call: _Call, out: Tensor) -> tuple[Choice, int]:
    """Sum `partial` into `out` in low bits: what was chosen in the end, and the bytes sent."""
    codec, tables, chooser = call.codec, call.tables, call.chooser
    if choice.collective == "hierarchical":
        return choice, hierarchical(partial, tables, codec=codec, nodes=chooser.nodes, out=out)
    if chooser.symmetric.takes(choice.collective, partial, codec, tables, call.group):
        sent = chooser.symmetric.all_reduce(choice.collective, partial, codec, tables, out)
        return replace(choice, why=f"{choice.why}, over symmetric memory"), sent
    step = {"one-shot": one_shot, "two-shot": two_shot}[choice.collective]
    return choice, step(partial, tables, codec=codec, group=call.group, out=out)


class _ReduceScatter(torch.autograd.Function):
    """This rank's block of the sum; the gradients of all blocks, together, are everyone's."""

    @staticmethod
    def forward(ctx, x, call):
        if ctx is not None:
            ctx.group, ctx.counts = call.group, call.counts
        clock, choice = Clock(x.device), call.chooser.reduce_scatter(x.numel())
        out = call.output(x[: call.counts[dist.get_rank(call.group)]])
        if choice.collective == "native reduce-scatter":
            if len(set(call.counts)) > 1:
                raise LowbitError(f"native reduce-scatter cannot split by {call.counts}")
            transport.native_reduce_scatter(out, x.contiguous(), group=call.group)
            size = x.numel() * x.element_size()
            call.count(choice, x, size, size * (call.ranks - 1) // call.ranks, clock)
            return out
        rows = math.prod(x.shape[1:-1])  # of codecs, for one step along the first axis
        partial = x.reshape(-1, x.shape[-1])
        sent = sequence.reduce_scatter(
            partial,
            call.tables,
            codec=call.codec,
            group=call.group,
            counts=[count * rows for count in call.counts],
            out=out.view(-1, out.shape[-1]),
        )
        call.count(choice, x, call.payload_bytes(choice.collective, len(partial)), sent, clock)
        return out

    @staticmethod
    def backward(ctx, grad):
        most = max(ctx.counts)
        mine = torch.nn.functional.pad(grad, [0, 0] * (grad.ndim - 1) + [0, most - len(grad)])
        full = grad.new_empty(len(ctx.counts) * most, *grad.shape[1:])
        transport.native_all_gather(full, mine.contiguous(), group=ctx.group)
        if any(count < most for count in ctx.counts):
            blocks = zip(full.split(most), ctx.counts, strict=True)
            full = torch.cat([block[:count] for block, count in blocks])
        return full, None


class _AllGather(torch.autograd.Function):
    """All ranks' blocks; the gradient of a block is the sum of all ranks' gradients of it."""

    @staticmethod
    def forward(ctx, x, call):
        if ctx is not None:
            ctx.group = call.group
        clock = Clock(x.device)
        shard = x.reshape(-1, x.shape[-1])
        out = x.new_empty(call.ranks * x.shape[0], *x.shape[1:])
        rows = out.view(call.ranks * len(shard), x.shape[-1])
        sent = sequence.all_gather(shard, call.tables, codec=call.codec, group=call.group, out=rows)
        payload = call.payload_bytes("all-gather", len(shard))
        call.count(Choice("all-gather", "fixed"), x, payload, sent, clock)
        return out

    @staticmethod
    def backward(ctx, grad):
        mine = grad.new_empty(grad.shape[0] // dist.get_world_size(ctx.group), *grad.shape[1:])
        transport.native_reduce_scatter(mine, grad.contiguous(), group=ctx.group)
        return mine, None
