"""A fork's own row-parallel linear by a route that it registers: checks in 2 forked ranks of TP 2.

Run by test_routes.py, as chains_worker.py is by test_chains.py.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from chain_oracle import assert_follows_chain
from chains_worker import DEEP, POINTS, index_of, low, main, reasons, without_chain
from small_gpt import build, message, whole_logits
from torch import Tensor, nn

import megatron_lowbit
from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.integration.sums.routes import LocalRoute, register_route, summed_by
from megatron_lowbit.integration.sums.sync_points import find_sync_points
from megatron_lowbit.model.summing import Reducer

CHECKS: dict[str, Callable] = {}


def check(function: Callable) -> Callable:
    CHECKS[function.__name__] = function
    return function


class DownProjection(nn.Module):
    """What a fork may have in the place of `RowParallelLinear`: it sums by itself."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.weight, self.output_size = linear.weight, linear.output_size
        self.sequence_parallel, self.mine, self.sums = False, linear.tp_group, True

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        partial = torch.matmul(x, self.weight.t())
        if self.sums:
            dist.all_reduce(partial, group=self.mine)
        return partial, None


DownProjection.__module__ = "my_fork.linears"


class DownRoute:
    """How it hands over its partial."""

    def takes(self, module: nn.Module) -> bool:
        return isinstance(module, DownProjection)

    def obstacle(self, module: nn.Module) -> str | None:
        return None

    def is_muted(self, module: nn.Module) -> bool:
        return not module.sums

    def group(self, module: nn.Module) -> dist.ProcessGroup:
        return module.mine

    def attach(self, module: nn.Module, reduce: Reducer) -> Callable[[], None]:
        module.sums = False
        hook = module.register_forward_hook(summed_by(reduce))

        def undo() -> None:
            hook.remove()
            module.sums = True

        return undo


def fork(layer: int = 1) -> nn.Module:
    """A model one of whose MLPs has the fork's linear."""
    model = build(torch.bfloat16, **DEEP)
    mlp = model.decoder.layers[layer].mlp
    mlp.linear_fc2 = DownProjection(mlp.linear_fc2)
    return model.eval()


def not_folded(model: nn.Module, index) -> str:
    return message(lambda: megatron_lowbit.apply(model, index, fold=True, collective="one-shot"))


@check
def refused_without_a_route(out: Path) -> None:
    index = without_chain(index_of(build(torch.bfloat16, **DEEP), out))
    said = message(lambda: megatron_lowbit.apply(fork(), index))
    assert said.startswith(
        "layer 2 mlp.linear_fc2 is a DownProjection, which reduces inside itself"
    )
    assert "register_route" in said


@check
def in_the_chain(out: Path) -> None:
    """Calibrated, checked by numbers, carried, near native, and given back bit for bit."""
    model = fork()
    native = whole_logits(model)
    undo = register_route(DownRoute(), in_chain=True)
    try:
        index = index_of(model, out)
        assert set(index.manifest["chain"].values()) == {""}
        for collective in ("one-shot", "two-shot"):
            with low(model, index, collective=collective, feedback=False) as handle:
                plain = whole_logits(model)
            with low(model, index, collective=collective) as handle:
                assert reasons(handle) == ["carried"] * POINTS
                fed = whole_logits(model)
                assert [point.traffic.calls for point in handle.status()] == [1] * POINTS
            assert sqnr(native, fed) > sqnr(native, plain) + 1, (sqnr(native, fed), collective)
        with low(model, index) as handle:
            assert_follows_chain(model, handle)
        with low(model, index, codec="bf16", feedback=False):
            assert sqnr(native, whole_logits(model)) > 35, "it sums twice, or not at all"
        assert torch.equal(whole_logits(model), native)
        assert "DownProjection whose partials go another way" in not_folded(model, index)
    finally:
        undo()


@check
def outside_of_the_chain(out: Path) -> None:
    """The carry passes it by, and calibration and inference agree on it."""
    undo = register_route(DownRoute(), in_chain=False)
    try:
        model = fork()
        index = index_of(model, out)
        with low(model, index) as handle:
            said = "off: route DownRoute was registered as outside of it"
            assert reasons(handle) == ["carried"] * 3 + [said] + ["carried"] * 2
            assert_follows_chain(model, handle)
    finally:
        undo()
    undo = register_route(DownRoute(), in_chain=True)
    try:
        assert "in the chain here, and outside" in message(
            lambda: megatron_lowbit.apply(fork(), index)
        )
    finally:
        undo()


@check
def other_names_and_subclasses(out: Path) -> None:
    """A name that Megatron has not; a subclass of Megatron's linear with a forward of its own."""
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    class Scaled(RowParallelLinear):
        def forward(self, x):
            out, bias = super().forward(2 * x)
            return out, bias

    class ScaledRoute(LocalRoute):
        def takes(self, module):
            return isinstance(module, Scaled)

        def obstacle(self, module):
            return None

    Scaled.__module__ = "my_fork.linears"
    model = build(torch.bfloat16, **DEEP)
    index = without_chain(index_of(model, out))
    model.decoder.layers[1].mlp.linear_fc2.__class__ = Scaled
    native = whole_logits(model.eval())
    undo = register_route(ScaledRoute(), in_chain=True)
    try:
        with low(model, index, codec="bf16", feedback=False):
            assert sqnr(native, whole_logits(model)) > 35
        assert "Scaled whose partials go another way" in not_folded(model, index)
    finally:
        undo()
    assert torch.equal(whole_logits(model), native)
    undo = register_route(DownRoute(), in_chain=True)
    try:
        mlp = fork().decoder.layers[1].mlp
        mlp.down = DownProjection(build(torch.bfloat16, **DEEP).decoder.layers[1].mlp.linear_fc2)
        model.decoder.layers[1].mlp = mlp
        points, _ = find_sync_points(model)
        assert [(p.layer, p.name) for p in points if p.name.endswith("down")] == [(2, "mlp.down")]
    finally:
        undo()


class Broken(DownRoute):
    """One whose `method` does something else."""

    def __init__(self, method: str, does: Callable):
        setattr(self, method, does)


def _raise(*args):
    raise RuntimeError("no such thing")


BROKEN = [
    ("takes", lambda module: 1, "route Broken: takes({kind}) gives 1"),
    ("takes", _raise, "route Broken: takes({kind}) raises RuntimeError: no such thing"),
    ("obstacle", lambda module: "is not ready", "layer 2 mlp.linear_fc2 is not ready"),
    ("obstacle", lambda module: 0, "route Broken: obstacle(DownProjection) gives 0"),
    ("is_muted", lambda module: None, "route Broken: is_muted(DownProjection) gives None"),
    ("group", lambda module: None, "route Broken: group(DownProjection) gives None"),
    ("attach", lambda module, reduce: None, "route Broken: attach(DownProjection) gives None"),
]


@check
def routes_that_are_wrong(out: Path) -> None:
    """One line with the route, the method and the module; the model is as it was."""
    index = without_chain(index_of(build(torch.bfloat16, **DEEP), out))
    model = fork()
    native = whole_logits(model)
    for method, does, expected in BROKEN:
        undo = register_route(Broken(method, does), in_chain=True)
        try:
            said = message(lambda: megatron_lowbit.apply(model, index))
        finally:
            undo()
        start, _, end = expected.partition("{kind}")
        assert said.startswith(start) and end in said and "\n" not in said, said
        assert torch.equal(whole_logits(model), native), method
    for lacks, words in (("output_size", "has no output_size"), ("weight", "has no weight")):
        model = fork()
        delattr(model.decoder.layers[1].mlp.linear_fc2, lacks)
        undo = register_route(DownRoute(), in_chain=True)
        try:
            assert words in message(lambda: megatron_lowbit.apply(model, index))  # noqa: B023
        finally:
            undo()
    undone = [register_route(kind(), in_chain=True) for kind in (DownRoute, OtherRoute)]
    try:
        said = message(lambda: megatron_lowbit.apply(fork(), index))
        assert said == (
            "route DownRoute and route OtherRoute both take a DownProjection: let one do so"
        )
    finally:
        for undo in undone:
            undo()


class OtherRoute(DownRoute):
    """Takes the same."""


if __name__ == "__main__":
    main(CHECKS)
