"""A fork's own row-parallel linear by a route that it registers, in the ranks of TP 2."""

import contextlib
import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from chain_models import POINTS, build_chain, chain_of, index_of, reasons, without_chain
from chain_oracle import assert_follows_chain
from small_gpt import low, refusal, whole_logits
from torch import Tensor, nn

import megatron_lowbit
from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.sums import routes
from megatron_lowbit.integration.sums.sync_points import find_sync_points
from megatron_lowbit.model.summing import Reducer

pytestmark = pytest.mark.on_ranks(2)


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
        hook = module.register_forward_hook(routes.summed_by(reduce))

        def undo() -> None:
            hook.remove()
            module.sums = True

        return undo


class OtherRoute(DownRoute):
    """Takes the same."""


class BrokenRoute(DownRoute):
    """One whose `method` does something else."""

    def __init__(self, method: str, does: Callable):
        setattr(self, method, does)


@contextlib.contextmanager
def registered(*given, in_chain: bool = True) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for route in given:
            stack.callback(megatron_lowbit.register_route(route, in_chain=in_chain))
        yield


@pytest.fixture
def fork(release) -> nn.Module:
    """A model one of whose MLPs has the fork's linear."""
    model = build_chain()
    mlp = model.decoder.layers[1].mlp
    mlp.linear_fc2 = DownProjection(mlp.linear_fc2)
    return model.eval()  # all of it: a module that trains carries nothing


@pytest.fixture(scope="module")
def index(release):
    """Of the model that Megatron has, of before chains were checked."""
    return without_chain(index_of(build_chain()))


def test_a_linear_that_sums_by_itself_is_refused_without_a_route(fork, index):
    said = refusal(fork, index)
    start = "layer 2 mlp.linear_fc2 is a DownProjection, which reduces inside itself"
    assert said.startswith(start)
    assert "register_route" in said


def test_in_the_chain(fork):
    """Calibrated, checked by numbers, carried, near native, and given back bit for bit."""
    native = whole_logits(fork)
    with registered(DownRoute()):
        index = index_of(fork)
        assert set(chain_of(index)) == {""}
        for collective in ("one-shot", "two-shot"):
            with low(fork, index, collective=collective, feedback=False):
                plain = whole_logits(fork)
            with low(fork, index, collective=collective) as handle:
                assert reasons(handle) == ["carried"] * POINTS
                fed = whole_logits(fork)
                assert [point.traffic.calls for point in handle.status()] == [1] * POINTS
            assert sqnr(native, fed) > sqnr(native, plain) + 1, collective
        with low(fork, index) as handle:
            assert_follows_chain(fork, handle)
    assert torch.equal(whole_logits(fork), native)


def test_partials_are_summed_once(fork, index):
    native = whole_logits(fork)
    with registered(DownRoute()):
        with low(fork, index, codec="bf16", feedback=False):
            assert sqnr(native, whole_logits(fork)) > 35, "it sums twice, or not at all"
        said = refusal(fork, index, fold=True, collective="one-shot")
    assert "DownProjection whose partials go another way" in said


def test_outside_of_the_chain(fork):
    """The carry passes it by, and calibration and inference agree on it."""
    with registered(DownRoute(), in_chain=False):
        index = index_of(fork)
        with low(fork, index) as handle:
            said = "off: route DownRoute was registered as outside of it"
            assert reasons(handle) == ["carried"] * 3 + [said] + ["carried"] * 2
            assert_follows_chain(fork, handle)
    with registered(DownRoute()):
        assert "in the chain here, and outside" in refusal(fork, index)


def test_a_subclass_of_megatrons_linear_with_a_forward_of_its_own(index):
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    class Scaled(RowParallelLinear):
        def forward(self, x):
            out, bias = super().forward(2 * x)
            return out, bias

    class ScaledRoute(routes.LocalRoute):
        def takes(self, module):
            return isinstance(module, Scaled)

        def obstacle(self, module):
            return None

    Scaled.__module__ = "my_fork.linears"
    model = build_chain()
    model.decoder.layers[1].mlp.linear_fc2.__class__ = Scaled
    native = whole_logits(model)
    with registered(ScaledRoute()):
        with low(model, index, codec="bf16", feedback=False):
            assert sqnr(native, whole_logits(model)) > 35
        said = refusal(model, index, fold=True, collective="one-shot")
        assert "Scaled whose partials go another way" in said
    assert torch.equal(whole_logits(model), native)


def test_a_name_that_megatron_has_not(fork):
    linear = build_chain().decoder.layers[1].mlp.linear_fc2
    fork.decoder.layers[1].mlp.down = DownProjection(linear)
    with registered(DownRoute()):
        points = [(point.layer, point.name) for point in find_sync_points(fork)[0]]
    assert [point for point in points if point[1].endswith("down")] == [(2, "mlp.down")]


def _raise(*args):
    raise RuntimeError("no such thing")


@pytest.mark.parametrize(
    ("method", "does", "text"),
    [
        ("takes", lambda module: 1, r"route BrokenRoute: takes\(\w+\) gives 1"),
        ("takes", _raise, r"route BrokenRoute: takes\(\w+\) raises RuntimeError: no such thing"),
        ("obstacle", lambda module: "is not ready", "layer 2 mlp.linear_fc2 is not ready"),
        ("obstacle", lambda module: 0, r"route BrokenRoute: obstacle\(DownProjection\) gives 0"),
        ("is_muted", lambda _: None, r"route BrokenRoute: is_muted\(DownProjection\) gives None"),
        ("group", lambda module: None, r"route BrokenRoute: group\(DownProjection\) gives None"),
        ("attach", lambda *_: None, r"route BrokenRoute: attach\(DownProjection\) gives None"),
    ],
    ids=["takes 1", "takes raises", "obstacle", "obstacle 0", "is_muted", "group", "attach"],
)
def test_a_route_that_is_wrong_is_named(fork, index, method, does, text):
    """One line with the route, the method and the module; the model is as it was."""
    native = whole_logits(fork)
    with registered(BrokenRoute(method, does)):
        said = refusal(fork, index)
    assert re.match(text, said), said
    assert "\n" not in said
    assert torch.equal(whole_logits(fork), native)


@pytest.mark.parametrize("attribute", ["output_size", "weight"])
def test_a_linear_that_lacks_something_is_refused(fork, index, attribute):
    delattr(fork.decoder.layers[1].mlp.linear_fc2, attribute)
    with registered(DownRoute()):
        assert f"has no {attribute}" in refusal(fork, index)


def test_two_routes_that_take_the_same_are_refused(fork, index):
    with registered(DownRoute(), OtherRoute()):
        assert refusal(fork, index) == (
            "route DownRoute and route OtherRoute both take a DownProjection: let one do so"
        )


@pytest.mark.parametrize(
    ("route", "in_chain", "message"),
    [
        (DownRoute, True, "is no route: it is a class: give an instance"),
        (object(), True, "is no route: it has no takes, obstacle, is_muted, group, attach"),
        (DownRoute(), 1, "in_chain=1: say True or False"),
    ],
)
def test_what_is_no_route_is_refused(route, in_chain, message):
    with pytest.raises(LowbitError, match=message):
        megatron_lowbit.register_route(route, in_chain=in_chain)
    assert routes._registered == []


def test_one_of_a_class_is_enough():
    undo = megatron_lowbit.register_route(DownRoute(), in_chain=True)
    with pytest.raises(LowbitError, match="a DownRoute is registered already"):
        megatron_lowbit.register_route(DownRoute(), in_chain=False)
    undo()
    undo()
    megatron_lowbit.register_route(DownRoute(), in_chain=False)()
    assert routes._registered == []
