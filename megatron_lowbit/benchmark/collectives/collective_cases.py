"""A variant at one message shape: its call, and what that call must return."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.distributed as dist

from megatron_lowbit.benchmark.collectives import correctness
from megatron_lowbit.benchmark.collectives.correctness import Partials
from megatron_lowbit.benchmark.collectives.sweep_plan import (
    NATIVE_FP32,
    SCATTERS,
    Plan,
    Variant,
    parse_codec,
)
from megatron_lowbit.comm import all_reduce, reduce_scatter
from megatron_lowbit.comm.feedback.chain import ErrorFeedback
from megatron_lowbit.comm.policy.making import make_policy
from megatron_lowbit.comm.policy.policy import Policy, Settings
from megatron_lowbit.comm.policy.timings import Kind
from megatron_lowbit.comm.transport import native_reduce_scatter


@dataclass(frozen=True)
class Case:
    """What is called, checked and timed.

    Attributes:
        variant: Of the plan.
        call: Gives ``[rows, hidden]`` on this rank.
        start: The first token of what it gives.
        expected: One period of the sum, bit for bit; None for native.
        floor: dB that it must clear.
    """

    variant: Variant
    call: Callable[[], torch.Tensor]
    start: int
    expected: torch.Tensor | None
    floor: float


Policies = Callable[[Variant], Policy]


def make_policies(plan: Plan, device: torch.device) -> Policies:
    """The policies of a sweep: made once each, since nodes make groups and `auto` measures."""
    return cache(partial(_make_policy, plan, device))


def _make_policy(plan: Plan, device: torch.device, variant: Variant) -> Policy:
    mode = variant.collective
    if mode == "reduce-scatter":
        return Policy("one-shot")
    tuning = plan.tuning if mode == "auto" else None
    node_size = plan.node_size if mode in ("auto", "hierarchical") else None
    codec = parse_codec(variant.codec)
    partials = Partials(dist.get_world_size(), 1, plan.hidden, device)
    assert dist.group.WORLD is not None, "the ranks have started it"
    return make_policy(
        Settings(mode, tuning=tuning, node_size=node_size),
        group=dist.group.WORLD,
        kinds=[Kind(codec, partials.tables(codec), carries=plan.feedback)],
        device=device,
        scatters=False,  # as in a model without sequence parallelism: all-reduces have all the time
    )


class Buffers:
    """This rank's partial, and a copy of each dtype that is reduced in place, as in Megatron."""

    def __init__(self, mine: torch.Tensor):
        self.mine = mine
        self._in_place: dict[torch.dtype, torch.Tensor] = {}

    def in_place(self, dtype: torch.dtype) -> torch.Tensor:
        """The copy of `dtype`, one for all cases."""
        if dtype not in self._in_place:
            self._in_place[dtype] = self.mine.to(dtype, copy=True)
        return self._in_place[dtype]

    def refill(self) -> None:
        """Make partials of the sums again."""
        for values in self._in_place.values():
            values.copy_(self.mine)


def make_case(
    variant: Variant, partials: Partials, buffers: Buffers, policies: Policies, plan: Plan
) -> Case:
    """A variant on the partials of one shape; call it on every rank alike."""
    scatter = variant.collective in SCATTERS
    start = partials.tokens // dist.get_world_size() * dist.get_rank() if scatter else 0
    if variant.is_native:
        call = _native(variant, buffers)
        return Case(variant, call, start, None, correctness.NATIVE_FLOOR)
    codec, policy = parse_codec(variant.codec), policies(variant)
    tables, step = partials.tables(codec), reduce_scatter if scatter else all_reduce
    mine = buffers.mine if scatter else buffers.in_place(buffers.mine.dtype)
    call = partial(step, mine, codec=codec, tables=tables, collective=policy)
    if plan.feedback:
        call = partial(call, feedback=ErrorFeedback())
    if not scatter:
        call = partial(call, in_place=True)
    collective = variant.collective
    if not scatter:
        collective = policy.all_reduce(buffers.mine.numel()).collective
    if collective == "native":
        return Case(variant, call, start, None, correctness.NATIVE_FLOOR)
    expected = correctness.simulate(
        partials.base,
        tables,
        codec=codec,
        collective=collective,
        node_size=plan.node_size,
        feedback=plan.feedback,
    )
    return Case(variant, call, start, expected, correctness.sqnr_floor(codec))


def _native(variant: Variant, buffers: Buffers) -> Callable[[], torch.Tensor]:
    """The backend's own collective."""
    mine = buffers.mine
    if variant.collective in SCATTERS:
        out = mine.new_empty(len(mine) // dist.get_world_size(), mine.shape[1])

        def scatter() -> torch.Tensor:
            native_reduce_scatter(out, mine)
            return out

        return scatter
    values = buffers.in_place(torch.float32 if variant == NATIVE_FP32 else mine.dtype)

    def reduce() -> torch.Tensor:
        dist.all_reduce(values)
        return values

    return reduce
