"""What the sums of a chain must be: `codecs.carry` over what each rank had at each sync point."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from small_gpt import whole_logits
from torch import Tensor, nn

from megatron_lowbit.codecs.carry import NO_CARRY, Carry
from megatron_lowbit.integration.sums import reducer as reducers


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[Tensor, Tensor, dict]]]:
    """The partial, the sum and the arguments of each call of a reducer."""
    originals = {name: getattr(reducers, name) for name in ("all_reduce", "reduce_scatter")}
    calls: list[tuple[Tensor, Tensor, dict]] = []

    def recording(original):
        def call(partial: Tensor, **arguments) -> Tensor:
            before = partial.detach().clone()
            total = original(partial, **arguments)
            calls.append((before, total.detach().clone(), arguments))
            return total

        return call

    for name, original in originals.items():
        setattr(reducers, name, recording(original))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(reducers, name, original)


def gathered(x: Tensor, group) -> list[Tensor]:
    """Every rank's."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def assert_follows_chain(model: nn.Module, handle, case: object = "", run=whole_logits) -> None:
    """Each one-shot sum of a pass is the specification's, along the chain that `status()` tells."""
    with recorded() as calls:
        run(model)
    follows_chain(calls, [status.feedback == "carried" for status in handle.status()], case)


def follows_chain(calls: list[tuple[Tensor, Tensor, dict]], carries: list[bool], case) -> None:
    """The same of recorded calls, of sync points in the order of one pass."""
    assert len(calls) == len(carries), (case, len(calls))
    owed: list[Tensor] | None = None
    last = max((n for n, carried in enumerate(carries) if carried), default=None)
    for number, ((partial, total, call), carried) in enumerate(zip(calls, carries, strict=True)):
        codec, tables, group = call["codec"], call["tables"], call["group"]
        partials = [part.flatten(0, -2) for part in gathered(partial, group)]
        given = [torch.empty(part.shape, dtype=torch.bfloat16) for part in partials]
        wanted = []
        for rank, part in enumerate(partials):
            carry = Carry(owed[rank] if owed else None, given[rank]) if carried else NO_CARRY
            wanted.append(codec.encode_with_carry(part, tables, carry, rank=rank))
        payloads = torch.stack(wanted[:1] if codec.bits == 0 else wanted)
        expected = codec.decode_sum(payloads, tables).to(partial.dtype).view(partial.shape)
        if total.shape != partial.shape:  # sequence parallel: this rank's tokens
            expected = expected.chunk(len(partials))[dist.get_rank(group)]
        assert torch.equal(total, expected), (case, f"sync point {number} of {len(calls)}")
        if carried:
            owed = given
            assert number == last or any(bool(g.any()) for g in given), (case, number)
