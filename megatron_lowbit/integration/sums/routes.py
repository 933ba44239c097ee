"""How each kind of row-parallel linear is made to hand over its partial instead of a sum.

A route knows one family of modules: how to tell them, what stands in the way of taking one over,
and how to put a reducer (`model.summing.Reducer`) in the place of its own reduction.
`integration.sums.sync_points` asks `ROUTES` in order; the first that takes a module serves it. To
support another kind of linear, write a route and add it there.
"""

import inspect
from collections.abc import Callable
from typing import Protocol

import torch.distributed as dist
from torch import nn

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


# The first that takes a module serves it. A linear of overlapped shared experts is of another kind,
# too, a patched linear is a local one, and an inference-optimized linear is Transformer Engine's.
ROUTES: tuple[Route, ...] = (
    OverlapRoute(),
    PatchedRoute(),
    LocalRoute(),
    InferenceOptimizedRoute(),
    TransformerEngineRoute(),
)


def route_of(module: nn.Module) -> Route | None:
    """The route that takes `module`, or None."""
    return next((route for route in ROUTES if route.takes(module)), None)


def may_scatter(module: nn.Module) -> bool:
    """Whether the sum of `module` may be a reduce-scatter in inference."""
    is_optimized = isinstance(route_of(module), InferenceOptimizedRoute)
    return is_optimized or bool(getattr(module.config, "sequence_parallel", False))
