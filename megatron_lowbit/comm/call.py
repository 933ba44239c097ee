"""One call of a collective on tensors: its arguments, checked before any rank sends.

What `all_reduce`, `reduce_scatter` and `all_gather` share. Contract of all three, for every codec
(comm/README.md, "What it promises"): all ranks end with the same bits; sums are fp32 in rank order;
any number of tokens, zero included; the output has the input's dtype; a NaN or infinity in a token
gives NaN in that token alone; the backward pass is that of Megatron's function in the same place
(`megatron/core/tensor_parallel/mappings.py`).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import Codec, Tables, get_codec
from megatron_lowbit.comm.feedback import Step
from megatron_lowbit.comm.policy.policy import Policy, Settings
from megatron_lowbit.comm.traffic import Clock, Counters, Decision
from megatron_lowbit.errors import LowbitError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN = ("native", "one-shot", "two-shot")


class Call:
    """One call's arguments, checked: every error comes before any rank sends, on all alike.

    Attributes:
        counts: Tokens that each rank gets of a reduce-scatter, which sets it.
    """

    counts: list[int]

    def __init__(self, x, group, codec, tables, collective, traffic, feedback=None):
        self.codec = get_codec(codec) if isinstance(codec, str) else codec
        self.group = group or dist.group.WORLD
        self.ranks = dist.get_world_size(self.group)
        _check_input(x)
        if tables is None:
            tables = self.codec.tables(x.shape[-1], device=x.device)
        _check_tables(tables, self.codec, x.shape[-1], self.ranks)
        self.tables, self.traffic, self.in_place = tables, traffic, False
        self.policy = collective
        if isinstance(collective, str):
            if collective not in _PLAIN:
                Settings(collective)  # an unknown one is named
                raise LowbitError(
                    f"{collective} needs comm.policy.policy.make_policy, once for a group"
                )
            self.policy = Policy(collective)
        self.feedback = feedback
        if tables.folded_index is not None:
            self._check_folded(x)
        if feedback is not None and records(x):
            raise LowbitError("error feedback serves inference only: its partial wants gradients")
        if self.codec.bits == 0 and feedback is None:
            raise LowbitError(f"{self.codec} sends nothing: it needs error feedback")

    def _check_folded(self, x: Tensor) -> None:
        if self.policy.mode not in ("one-shot", "two-shot"):
            raise LowbitError(
                f"a folded weight's partials are rotated, which {self.policy.mode} does not undo: "
                "choose one-shot or two-shot"
            )
        if self.feedback is not None:
            raise LowbitError("a folded weight's error is rotated: it cannot be carried on")
        if records(x):
            raise LowbitError("a folded weight serves inference only: its partial wants gradients")

    def step(self, x: Tensor) -> Step | None:
        """What this call takes of the one before it, and gives to the next."""
        if self.feedback is None or self.ranks == 1:
            return None
        return self.feedback.step(x, self.tables.hidden)

    def output(self, x: Tensor) -> Tensor:
        """Where the sum goes: a partial whose weight has rotated it is wider than its sum."""
        return x.new_empty(*x.shape[:-1], self.tables.hidden)

    def count(self, decision: Decision, x: Tensor, payload: int, sent: int, clock: Clock) -> None:
        if self.traffic is not None:
            tokens = x.numel() // x.shape[-1]
            counters = Counters(1, tokens, tokens * self.tables.hidden, payload, sent)
            self.traffic.add(decision, counters, clock.stop())

    def payload_bytes(self, collective: str, tokens: int) -> int:
        """Bytes of `tokens` in the form they travel in; the mean of two where a sum is sent."""
        first = self.codec.row_bytes(self.tables)
        nodes = self.policy.nodes
        sums = collective == "two-shot" or (collective == "hierarchical" and nodes.count > 2)
        if not sums:
            return tokens * first
        second = self.codec.for_sum().row_bytes(self.codec.sum_tables(self.tables))
        return tokens * (first + second) // 2


def run(function: type[torch.autograd.Function], x: Tensor, call: Call) -> Tensor:
    if records(x):
        return function.apply(x, call)
    return function.forward(None, x, call)  # without autograd's 5 us a call


def records(x: Tensor) -> bool:
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
