"""One call of a collective on tensors: its arguments, checked before any rank sends.

What `all_reduce`, `reduce_scatter` and `all_gather` share. Contract of all three, for every codec
(comm/README.md, "What it promises"): all ranks end with the same bits; sums are fp32 in rank order;
any number of tokens, zero included; the output has the input's dtype; a NaN or infinity in a token
gives NaN in that token alone; the backward pass is that of Megatron's function in the same place
(`megatron/core/tensor_parallel/mappings.py`).

A group serves one thread at a time. Two at once would mix their messages, since ranks cannot know
which thread of another rank a message is of: both get an error, and the group is aborted, so that
the other ranks end, too, and do not wait. Only an overlap is seen: a sum just before it may already
be of two threads, where ranks took them in another order.

A group that two threads were in, or that lost a rank in the middle of a call, serves no more: what
a later call sends would meet the rest of that one, and Gloo ends a process whose message is longer
than its receiver expects. `torch.compile` breaks its graph at a collective.
"""

import contextlib
import functools
import numbers
from collections.abc import Callable
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import DEFAULT_CODEC, Codec, Tables, get_codec
from megatron_lowbit.comm.call_check import is_checking, require_same_call
from megatron_lowbit.comm.feedback.chain import Step
from megatron_lowbit.comm.policy.policy import Policy, Settings
from megatron_lowbit.comm.traffic import Clock, Counters, Decision, Traffic
from megatron_lowbit.errors import LowbitError

_OWN_TABLES = "give what this codec's tables() makes for it"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN = ("native", "one-shot", "two-shot")
_GRADIENTS = "serves inference only, and this partial wants gradients: call it in torch.no_grad()"
_CODEC, _COLLECTIVE = (str, Codec), (str, Policy)
_inside: dict[int, object] = {}  # by id of a group: the call that is under way
_broken: WeakKeyDictionary[dist.ProcessGroup, str] = WeakKeyDictionary()  # and what is said of it
_eval_frame = torch._C._dynamo.eval_frame  # there before torch._dynamo is, which takes seconds


def public(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorates a public collective: one thread at a time, no compiled graph, the same call on all.

    Costs 1 us a call, measured in a loop (8 KB in native over 2 ranks take 380).
    """

    @functools.wraps(function)
    def entered(x: Tensor, **call) -> Tensor:
        if _is_compiled():
            return torch.compiler.disable(entered)(x, **call)
        group, me = _group(call.get("group")), object()
        _require_whole(group)
        if _inside.setdefault(id(group), me) is not me and group.size() > 1:
            _tear(group)
        try:
            if is_checking():
                require_same_call(function.__name__, x, call, group)
            if not isinstance(x, Tensor):
                raise LowbitError(f"{x!r:.80} is no tensor: give [..., hidden]")
            result = function(x, **call)
        except Exception as error:
            _require_whole(group, error)
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                _broken[group] = (
                    f"an earlier collective of {_named(group)} failed ({error!s:.80}): "
                    "end this process"
                )
            raise
        finally:
            if _inside.get(id(group)) is me:
                del _inside[id(group)]
        _require_whole(group)
        return result

    vars(entered)["_torchdynamo_disable"] = True  # as torch.compiler.disable tells the compiler
    return entered


def _is_compiled() -> bool:
    """Within torch.compile: while it traces, or when what it has made runs."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return _eval_frame.get_eval_frame_callback() is not None


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if isinstance(group, dist.ProcessGroup):
        return group
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise LowbitError("this rank is not in the group: call it on the ranks that are")
    if group is not None:
        raise LowbitError(f"group={group!r}: give a torch.distributed process group, or none")
    if not dist.is_initialized():
        raise LowbitError("no process group: call torch.distributed.init_process_group before")
    world = dist.group.WORLD
    assert world is not None, "it is initialized"
    return world


def _require_whole(group: dist.ProcessGroup, cause: Exception | None = None) -> None:
    if _broken and group in _broken:
        raise LowbitError(_broken[group]) from cause


def _tear(group: dist.ProcessGroup) -> NoReturn:
    """Nothing that follows on this group could be trusted: nobody goes on, or waits for this."""
    if group not in _broken:
        _broken[group] = (
            f"two threads at once in collectives of {_named(group)}: give each a group of its own "
            "(torch.distributed.new_group), or one thread all of them"
        )
        with contextlib.suppress(RuntimeError):  # a backend that cannot: the others time out
            group.abort()
    raise LowbitError(_broken[group])


def _named(group: dist.ProcessGroup) -> str:
    return f"group {dist.get_process_group_ranks(group)}"


class Call:
    """One call's arguments, checked: every error comes before any rank sends, on all alike.

    Attributes:
        counts: Tokens that each rank gets of a reduce-scatter, which sets it.
    """

    counts: list[int]

    def __init__(self, x, group, codec, tables, collective, traffic, feedback=None):
        _check_kinds(codec, tables, collective, traffic, feedback)
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
                    f"{collective} needs comm.policy.making.make_policy, once for a group"
                )
            self.policy = Policy(collective)
        self.feedback = feedback
        if tables.folded_index is not None:
            self._check_folded(x)
        if feedback is not None and records(x):
            raise LowbitError(f"error feedback {_GRADIENTS}")
        if self.codec.bits == 0 and feedback is None:
            raise LowbitError(
                f"{self.codec} sends nothing: it needs error feedback, so give feedback="
            )

    def _check_folded(self, x: Tensor) -> None:
        if self.policy.mode not in ("one-shot", "two-shot"):
            raise LowbitError(
                f"a folded weight's partials are rotated, which {self.policy.mode} does not undo: "
                "choose one-shot or two-shot"
            )
        if self.feedback is not None:
            raise LowbitError(
                "a folded weight's error is rotated and cannot be carried on: leave out feedback "
                "or fold"
            )
        if records(x):
            raise LowbitError(f"a folded weight {_GRADIENTS}")

    def step(self, x: Tensor) -> Step | None:
        """What this call takes of the one before it, and gives to the next."""
        if self.feedback is None or self.ranks == 1:
            return None
        return self.feedback.step(x, self.tables.hidden)

    def output(self, x: Tensor) -> Tensor:
        """Where the sum goes: a partial whose weight has rotated it is wider than its sum."""
        return x.new_empty(*x.shape[:-1], self.tables.hidden)

    def count(self, decision: Decision, x: Tensor, payload: int, sent: int, clock: Clock) -> None:
        """Add this call to the counters, if there are any; it ends here."""
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
    """Run a collective; its backward pass is recorded only where a gradient is wanted."""
    if records(x):
        return function.apply(x, call)
    return function.forward(None, x, call)  # without autograd's 5 us a call


def records(x: Tensor) -> bool:
    """Whether autograd records what is done with `x`."""
    return torch.is_grad_enabled() and x.requires_grad


def check_counts(counts: Any, tokens: int, ranks: int) -> None:
    """Raise LowbitError unless `counts` are whole, not below 0, one a rank, and make `tokens`."""
    are_whole = isinstance(counts, list | tuple) and all(
        isinstance(c, numbers.Integral) and not isinstance(c, bool) and int(c) >= 0 for c in counts
    )
    if not are_whole:
        raise LowbitError(f"counts={counts!r}: give a list of whole numbers, none below 0")
    if len(counts) != ranks or sum(counts) != tokens:
        raise LowbitError(
            f"counts {counts} do not split {tokens} tokens over {ranks} ranks: give one a rank, "
            "together all tokens"
        )


def _check_kinds(codec, tables, collective, traffic, feedback) -> None:
    """Raise LowbitError for an argument of a wrong type."""
    if not isinstance(codec, _CODEC):
        raise LowbitError(f"codec={codec!r}: give a codec or its name, such as {DEFAULT_CODEC!r}")
    if tables is not None and not isinstance(tables, Tables):
        raise LowbitError(f"tables={tables!r}: give what the codec's tables() makes, or none")
    if not isinstance(collective, _COLLECTIVE):
        raise LowbitError(f"collective={collective!r}: give a Policy or one of {', '.join(_PLAIN)}")
    if traffic is not None and not isinstance(traffic, Traffic):
        raise LowbitError(f"traffic={traffic!r}: give a Traffic, or none")
    if feedback is not None and not callable(getattr(feedback, "step", None)):
        raise LowbitError(f"feedback={feedback!r}: give an ErrorFeedback, or none")


def _check_input(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise LowbitError(f"cannot send {x.dtype} in low bits: supported are {supported}")
    if x.layout is not torch.strided or x.is_meta:
        raise LowbitError(f"low bits need a dense tensor with values, got {x.layout} on {x.device}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise LowbitError(f"low bits need [..., hidden], got shape {tuple(x.shape)}")


def _check_tables(tables: Tables, codec: Codec, hidden: int, ranks: int) -> None:
    if tables.codec != codec.name:
        raise LowbitError(
            f"tables are of codec {tables.codec}, the codec is {codec.name}: {_OWN_TABLES}"
        )
    if tables.width != hidden:
        raise LowbitError(
            f"tables are for hidden size {tables.width}, the tensor has {hidden}: {_OWN_TABLES}"
        )
    for by_rank in (tables.scale, tables.center):
        if by_rank is not None and len(by_rank) != ranks:
            raise LowbitError(
                f"tables are for {len(by_rank)} ranks, the group has {ranks}: give statistics of "
                f"{ranks} ranks to tables()"
            )
