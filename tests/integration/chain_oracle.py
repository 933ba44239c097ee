"""What sums must be: in a chain `codecs.carry` over what each rank had at each sync point."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from small_gpt import assert_alike, fp32_accumulation, gathered, low, whole_logits
from torch import Tensor, nn

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.codecs.carry import NO_CARRY, Carry
from megatron_lowbit.integration.sums import reducer as reducers

CODECS = ("bf16", "rotated-hybrid")


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[Tensor, Tensor, dict]]]:
    """The partial, the sum and the arguments of each call of a reducer."""
    calls: list[tuple[Tensor, Tensor, dict]] = []

    def recording(original):
        def call(partial: Tensor, **arguments) -> Tensor:
            before = partial.detach().clone()
            total = original(partial, **arguments)
            calls.append((before, total.detach().clone(), arguments))
            return total

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "reduce_scatter"):
            patch.setattr(reducers, name, recording(getattr(reducers, name)))
        yield calls


def assert_follows_chain(model: nn.Module, handle, case: object = "") -> None:
    """Each one-shot sum of a pass is the specification's, along the chain that `status()` tells."""
    with recorded() as calls:
        whole_logits(model)
    carries = [status.feedback == "carried" for status in handle.status()]
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


def check_codecs(model, index, points: list, *, feedback=None, most=40) -> dict[str, Tensor]:
    """One-shot sums at `points`: alike on all ranks, as they must be, and gone after `remove`.

    Args:
        most: Decibels that 4 bits have at most.

    Returns:
        Logits by codec, and native ones.
    """
    native, exact, found = whole_logits(model), fp32_accumulation(model), {}
    collective = "reduce-scatter" if model.config.sequence_parallel else "one-shot"
    assert index.manifest["chain"] == {f"layer {layer} {name}": "" for layer, name in points}
    for codec in CODECS:
        with low(model, index, codec=codec, feedback=feedback) as handle:
            found[codec] = whole_logits(model)
            assert [(status.layer, status.name) for status in handle.status()] == points
            assert {choice["collective"] for choice in handle.stats()["total"]} == {collective}
            carries = codec != "bf16" and feedback is None
            assert {status.feedback == "carried" for status in handle.status()} == {carries}
            assert_follows_chain(model, handle, codec)
            assert handle.feedback()["dropped"] == 0
        assert_alike(found[codec])
    # Of two ranks only the order of an fp32 sum could differ, which has none.
    assert sqnr(exact, found["bf16"]) > 60
    assert 8 < sqnr(native, found["rotated-hybrid"]) < most
    assert torch.equal(whole_logits(model), native)
    return {"native": native, **found}
