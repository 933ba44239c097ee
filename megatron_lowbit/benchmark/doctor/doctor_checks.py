"""What joins a group of ranks and what runs on it, and whether its sums have the right bits.

The bits are checked as they will travel: a short chain of sums by every codec of the model and each
collective, carries included, against the same chain of all ranks in one process, in plain torch.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.benchmark.prediction.probe import probe_link
from megatron_lowbit.comm import all_reduce
from megatron_lowbit.comm.agreement import on_every_rank
from megatron_lowbit.comm.feedback.chain import Chain, ErrorFeedback, Step
from megatron_lowbit.comm.policy.timings import Kind
from megatron_lowbit.comm.policy.tuning import this_machine
from megatron_lowbit.comm.simulated import simulated_all_reduce
from megatron_lowbit.comm.symmetric_memory import open_symmetric_memory
from megatron_lowbit.comm.traffic import Traffic
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels import select
from megatron_lowbit.kernels.switches import SWITCH, disabled

_TOKENS = 37  # no number of ranks divides them evenly
_SUMS = 3  # the first takes nothing, the second takes and gives


def group_lines(group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """Measure and describe a group; call it on every rank."""
    machine, link = this_machine(group), probe_link(group, device)
    memory = open_symmetric_memory(group, device)
    return [
        f"ranks    {dist.get_world_size(group)}, {machine['backend']} on {machine['device']}",
        f"links    a step takes {1000 * link.latency:.3g} ms, a rank sends {_rate(link.bandwidth)}"
        f" (native: {1000 * link.native_latency:.3g} ms, {_rate(link.native_bandwidth)})",
        f"memory   symmetric memory {f'off: {memory.reason}' if memory.reason else 'on'}",
        f"kernels  {select.describe(device.type)}",
    ]


def check_bits(
    kinds: Sequence[Kind],
    collectives: Sequence[str],
    group: dist.ProcessGroup,
    device: torch.device,
) -> str:
    """Compare sums with plain torch; call it on every rank. Gives a line for people.

    Raises:
        LowbitError: On every rank: other bits on some rank.
    """
    for kind in kinds:
        for collective in collectives:
            _check(kind, collective, group, device)
    carried = ", carries included" if any(kind.carries for kind in kinds) else ""
    return (
        f"bits     as in plain torch, to the last one: {' and '.join(collectives)} by "
        f"{len(kinds)} codec{'s' if len(kinds) > 1 else ''}{carried}"
    )


def _check(kind: Kind, collective: str, group: dist.ProcessGroup, device: torch.device) -> None:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    tables = kind.tables.to(device)
    feedback = ErrorFeedback() if kind.carries else None
    chains = [Chain() for _ in range(ranks)]
    for number in range(_SUMS):
        partials = _partials(number, ranks, tables.hidden, device)
        call = {"codec": kind.codec, "tables": tables, "collective": collective}
        got = all_reduce(partials[rank], group=group, feedback=feedback, **call)
        steps = _steps(chains, number, partials, tables.hidden) if kind.carries else ()
        with disabled():
            expected = simulated_all_reduce(
                partials,
                tables,
                codec=kind.codec,
                collective=collective,
                steps=steps,
                traffic=Traffic(),
            )

        def compare(got: Tensor = got, expected: Tensor = expected) -> None:
            if not torch.equal(got, expected):
                raise LowbitError(
                    f"{collective} of {kind.codec!r} gives other bits than plain torch "
                    f"({int((got != expected).sum())} of {got.numel()} values): the kernels here "
                    f"({select.describe(device.type)}) are not right; set {SWITCH}=0, and report it"
                )

        on_every_rank(compare, group=group)


def _steps(chains: list[Chain], place: int, partials: Tensor, hidden: int) -> list[Step]:
    """What each rank takes and gives."""
    return [
        chain.step(place, partial, hidden, gives=True, needs=False)
        for chain, partial in zip(chains, partials, strict=True)
    ]


def _partials(number: int, ranks: int, hidden: int, device: torch.device) -> Tensor:
    """BF16 ``[ranks, tokens, hidden]``, the same on every rank."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(ranks, _TOKENS, hidden, generator=generator).to(device, torch.bfloat16)


def _rate(bandwidth: float) -> str:
    bits = 8 * bandwidth
    return f"{bits / 1e9:.3g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mbit/s"
