"""How each kind of row-parallel linear is made to hand over its partial instead of a sum.

A route knows one family of modules: how to tell them, what stands in the way of taking one over,
and how to put a reducer (`model.summing.Reducer`) in the place of its own reduction.
`integration.sums.sync_points` asks `ROUTES` in order; the first that takes a module serves it. To
support another kind of linear, write a route and add it there. A fork gives its own by
`register_route`; those are asked first.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.sums.shared_experts import OverlapRoute
from megatron_lowbit.integration.sums.transformer_engine import (
    InferenceOptimizedRoute,
    TransformerEngineRoute,
)
from megatron_lowbit.model.summing import Reducer


class Route(Protocol):
    """One family of row-parallel linears."""

    def takes(self, module: nn.Module) -> bool:
        """Whether `module` is of this family."""

    def obstacle(self, module: nn.Module) -> str | None:
        """Why `module` cannot be taken over, to follow its name in an error; None if it can."""

    def is_muted(self, module: nn.Module) -> bool:
        """Whether its reduction is switched off, by Megatron or by `attach`."""

    def group(self, module: nn.Module) -> dist.ProcessGroup:
        """The tensor-parallel group that `module` sums over."""

    def attach(self, module: nn.Module, reduce: Reducer) -> Callable[[], None]:
        """Let `reduce` sum `module`'s partials from now on; gives what undoes that exactly."""


class LocalRoute:
    """megatron-core's own `RowParallelLinear`, of the local spec.

    Megatron itself can mute its reduction (`explicit_expert_comm`, as its shared experts do): the
    module then returns its partial, and a forward hook sums it. The names that it reduces by,
    `reduce_from_tensor_model_parallel_region` and
    `reduce_scatter_to_sequence_parallel_region`, are left alone.
    """

    def takes(self, module: nn.Module) -> bool:
        from megatron.core.tensor_parallel.layers import RowParallelLinear

        return isinstance(module, RowParallelLinear)

    def obstacle(self, module: nn.Module) -> str | None:
        from megatron.core.tensor_parallel.layers import RowParallelLinear

        if type(module).forward is not RowParallelLinear.forward:
            return (
                f"has a forward pass of its own, that of {type(module).__name__}, which may change "
                "its sum: what it would get is a partial"
            )
        if not module.skip_bias_add:
            return "adds its bias itself (skip_bias_add=False), so its reduction cannot be muted"
        return None

    def is_muted(self, module: nn.Module) -> bool:
        return module.explicit_expert_comm

    def group(self, module: nn.Module) -> dist.ProcessGroup:
        return module.tp_group

    def attach(self, module: nn.Module, reduce: Reducer) -> Callable[[], None]:
        module.explicit_expert_comm = True
        hook = module.register_forward_hook(summed_by(reduce))

        def undo() -> None:
            hook.remove()
            module.explicit_expert_comm = False

        return undo


class PatchedRoute(LocalRoute):
    """The same class in a Megatron with patches/row_parallel_hook.patch.

    Its `forward` then calls the module's `lowbit_reduce`, where there is one, in the place of its
    own reduction and before it adds a bias: nothing needs to be muted.
    """

    def takes(self, module: nn.Module) -> bool:
        # By the code that would run: a subclass with a forward of its own need not call the hook.
        return super().takes(module) and "lowbit_reduce" in _constants(type(module).forward)

    def obstacle(self, module: nn.Module) -> str | None:
        return None

    def is_muted(self, module: nn.Module) -> bool:
        return super().is_muted(module) or getattr(module, "lowbit_reduce", None) is not None

    def attach(self, module: nn.Module, reduce: Reducer) -> Callable[[], None]:
        # A function, as a forward hook is: a reducer of class nn.Module would become a submodule.
        module.lowbit_reduce = lambda partial, scatter: reduce(partial, scatter)
        return lambda: delattr(module, "lowbit_reduce")


def _constants(function: Callable) -> tuple:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_consts if code else ()


def summed_by(reduce: Reducer):
    """A forward hook that sums the partial of a linear's ``(partial, bias)`` by `reduce`."""

    def hook(module: nn.Module, inputs: tuple, output: tuple):
        partial, bias = output
        # Read at every call: engines switch it off for the steps of decoding.
        return reduce(partial, module.sequence_parallel), bias

    return hook


_OVERLAP = OverlapRoute()
# The first that takes a module serves it. A linear of overlapped shared experts is of another kind,
# too, a patched linear is a local one, and an inference-optimized linear is Transformer Engine's.
ROUTES: tuple[Route, ...] = (
    _OVERLAP,
    PatchedRoute(),
    LocalRoute(),
    InferenceOptimizedRoute(),
    TransformerEngineRoute(),
)


class RegisteredRoute:
    """A fork's route; what it answers is checked, since its author cannot see who asks.

    Attributes:
        in_chain: Whether its linears' sums go to the residual stream as they are (`chains`).
    """

    def __init__(self, route: Route, in_chain: bool):
        self._route, self.in_chain = route, in_chain

    def __str__(self) -> str:
        return f"route {type(self._route).__name__}"

    def takes(self, module: nn.Module) -> bool:
        return self._answer("takes", bool, module)

    def obstacle(self, module: nn.Module) -> str | None:
        said = self._answer("obstacle", (str, type(None)), module)
        return said or self._lacking(module)

    def is_muted(self, module: nn.Module) -> bool:
        return self._answer("is_muted", bool, module)

    def group(self, module: nn.Module) -> dist.ProcessGroup:
        return self._answer("group", dist.ProcessGroup, module)

    def attach(self, module: nn.Module, reduce: Reducer) -> Callable[[], None]:
        return self._answer("attach", Callable, module, reduce)

    def _lacking(self, module: nn.Module) -> str | None:
        """What its sync point could not say of itself later."""
        self.group(module)
        size = getattr(module, "output_size", None) or getattr(module, "out_features", None)
        if not isinstance(size, int):
            return f"has no output_size, which {self} must see to"
        if not isinstance(getattr(module, "weight", None), torch.Tensor):
            return f"has no weight, which {self} must see to: its device is that of the partials"
        return None

    def _answer(self, method: str, kind: Any, module: nn.Module, *more: Any) -> Any:
        """What a method of the route gives, or an error that names both and the module."""
        where = f"{self}: {method}({type(module).__name__})"
        try:
            given = getattr(self._route, method)(module, *more)
        except LowbitError:
            raise
        except Exception as error:
            said = " ".join(str(error).split())
            raise LowbitError(f"{where} raises {type(error).__name__}: {said}") from error
        if not isinstance(given, kind):
            raise LowbitError(f"{where} gives {given!r}: see {Route.__module__}.Route")
        return given


_METHODS = ("takes", "obstacle", "is_muted", "group", "attach")
_registered: list[RegisteredRoute] = []


def register_route(route: Route, *, in_chain: bool) -> Callable[[], None]:
    """Let sync points be made of a fork's own row-parallel linears; before `apply`.

    Args:
        route: How they hand over their partials. Its linears need not be called as Megatron's are.
        in_chain: Whether such a linear's sum is added to the residual stream as it is: no norm, no
            gate, no scale in its own forward pass. Then it carries errors, if nothing that we do
            not know stands around it either (`integration.sums.chains`); else it stands outside.

    Returns:
        What undoes it.

    Raises:
        LowbitError: It is not a route, or one of its class is registered already.
    """
    missing = [name for name in _METHODS if not callable(getattr(route, name, None))]
    if isinstance(route, type) or missing:
        what = "it is a class: give an instance" if isinstance(route, type) else "it has no "
        raise LowbitError(f"{route!r} is no route: {what}{', '.join(missing)}")
    if not isinstance(in_chain, bool):
        raise LowbitError(f"in_chain={in_chain!r}: say True or False")
    if any(type(known._route) is type(route) for known in _registered):
        raise LowbitError(f"a {type(route).__name__} is registered already: do it once")
    registered = RegisteredRoute(route, in_chain)
    _registered.append(registered)

    def undo() -> None:
        if registered in _registered:
            _registered.remove(registered)

    return undo


def registered_route(module: nn.Module) -> RegisteredRoute | None:
    """The fork's route that takes `module`, or None.

    Raises:
        LowbitError: Two of them do.
    """
    if not _registered or _OVERLAP.takes(module):  # which its owner sums, whatever it is
        return None
    taking = [route for route in _registered if route.takes(module)]
    if len(taking) > 1:
        raise LowbitError(
            f"{' and '.join(map(str, taking))} both take a {type(module).__name__}: let one do so"
        )
    return taking[0] if taking else None


def route_of(module: nn.Module) -> Route | None:
    """The route that takes `module`, or None."""
    return registered_route(module) or next(
        (route for route in ROUTES if route.takes(module)), None
    )


def is_plain(module: nn.Module) -> bool:
    """Whether a linear's partial is no more than its input times its weight: Megatron's own."""
    return isinstance(route_of(module), LocalRoute)  # a fork's, whatever it derives from, is not


def may_scatter(modules: Iterable[nn.Module]) -> bool:
    """Whether the sum of one of `modules` may be a reduce-scatter in inference."""
    return any(_may_scatter(module) for module in modules)


def _may_scatter(module: nn.Module) -> bool:
    if isinstance(route_of(module), (RegisteredRoute, InferenceOptimizedRoute)):
        return True  # decided at each call
    return bool(getattr(module.config, "sequence_parallel", False))
