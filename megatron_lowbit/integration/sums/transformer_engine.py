"""Transformer Engine's row-parallel linears, and the inference-optimized ones built on them.

TE's `Linear` sums inside its forward pass. What it sums by it reads from itself at every call, so
it can be muted from outside, as Megatron itself does for shared experts that overlap with the token
dispatcher: with ``parallel_mode=None`` it returns its partial, and neither scatters it nor, in the
backward pass, gathers gradients. Its matrix product, FP8 included, stays. A forward hook then sums
the partial, and adds the bias where TE would have done so, after the sum.

`InferenceRowParallelLinear` (`--transformer-impl inference_optimized`) is a TE linear with another
forward pass for inference: a reduce-scatter over NVLink, whatever ``parallel_mode`` says, unless
``tp_size`` is 1.

Nothing here imports `transformer_engine`; its sources are only looked at. All that is set is read
in `Linear.forward` of every release of TE from 1.0 to 2.18.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megatron_lowbit.model.summing import Reducer

# What is set for as long as a module is muted. TE keeps a bias that it adds itself out of its
# matrix product in row-parallel linears (`gemm_bias_unfused_add`), and adds it after the sum.
MUTED_TE = {"parallel_mode": None, "apply_bias": False, "gemm_bias_unfused_add": False}
MUTED_INFERENCE = {"parallel_mode": None, "tp_size": 1}

# What else is used of a module.
USED = ("tp_group", "sequence_parallel", "apply_bias", "te_return_bias", "config", "weight")

# MLPs that take their row-parallel linear's weight and never call it, and how they are chosen.
FUSED_MLPS = {
    "TEFusedMLP": "--use-transformer-engine-op-fuser",
    "FusedSharedExpertMLP": "--use-grouped-gemm-for-shared-expert",
}

_REMEDY = "use a release of Transformer Engine that is known to work, or --transformer-impl local"


class TransformerEngineRoute:
    """`TERowParallelLinear`, of the Transformer Engine spec."""

    muted: dict[str, Any] = MUTED_TE

    def takes(self, module: nn.Module) -> bool:
        from megatron.core.extensions import transformer_engine as extension

        # Without TE its classes are mocks there.
        return extension.HAVE_TE and isinstance(module, extension.TERowParallelLinear)

    def obstacle(self, module: nn.Module) -> str | None:
        return self._moved(module) or self._otherwise_summed(module)

    def is_muted(self, module: nn.Module) -> bool:
        return getattr(module, "parallel_mode", "row") is None

    def group(self, module: nn.Module) -> dist.ProcessGroup:
        return module.tp_group

    def attach(self, module: nn.Module, reduce: Reducer) -> Callable[[], None]:
        before = {name: getattr(module, name) for name in self.muted}
        hook = module.register_forward_hook(self._summed_by(reduce, bool(before.get("apply_bias"))))
        _set(module, self.muted)

        def undo() -> None:
            hook.remove()
            _set(module, before)

        return undo

    def _scatters(self, module: nn.Module) -> bool:
        """Whether the sum is scattered; asked at every call, since engines switch sequence
        parallelism off for the steps of decoding."""
        return module.sequence_parallel

    def _readers(self) -> dict[type, set[str]]:
        """The classes whose forward pass must read what is set, the module's own first."""
        from megatron.core.extensions.transformer_engine import TELinear

        return {TELinear: set(), TELinear.__base__: set(self.muted)}

    def _moved(self, module: nn.Module) -> str | None:
        """What of TE or Megatron is not where it was when this was written."""
        missing = [name for name in (*self.muted, *USED) if not hasattr(module, name)]
        if missing:
            return f"has no {', '.join(missing)}, which low-bit communication needs: {_REMEDY}"
        if module.tp_group is None:
            return "has no tensor-parallel group (its tp_group is None): set it before"
        readers = self._readers()
        own: Any = next(iter(readers))
        if type(module).forward is not own.forward:
            return f"has a forward pass of its own, that of {type(module).__name__}: {_REMEDY}"
        for kind, names in readers.items():
            unread = sorted(names - reads_in_forward(kind))
            if unread:
                name = f"{kind.__module__}.{kind.__qualname__}"
                return f"cannot be muted, {name}.forward reads no {', '.join(unread)}: {_REMEDY}"
        return None

    def _otherwise_summed(self, module: nn.Module) -> str | None:
        """What else sums its output, and the flag that asks for it."""
        if any(name.startswith("ub_") and value is True for name, value in vars(module).items()):
            return "sums while it multiplies (userbuffers): leave out --tp-comm-overlap"
        if getattr(module.config, "fp8", None) and module.sequence_parallel:
            return (
                "is padded by Megatron for FP8 inference, which then reduce-scatters outside of "
                "it: leave out --sequence-parallel or --fp8-format"
            )
        return None

    def _summed_by(self, reduce: Reducer, adds_bias: bool):
        def hook(module: nn.Module, inputs: tuple, output: tuple) -> tuple[Tensor, Tensor | None]:
            partial, bias = output
            total = reduce(partial, self._scatters(module))
            if adds_bias:
                total = total + module.bias.to(total.dtype)
            return total, bias

        return hook


class InferenceOptimizedRoute(TransformerEngineRoute):
    """`InferenceRowParallelLinear`, of the inference-optimized spec."""

    muted = MUTED_INFERENCE

    def takes(self, module: nn.Module) -> bool:
        if not super().takes(module):
            return False
        # Releases before 0.16 have no such layers.
        layers = sys.modules.get("megatron.core.tensor_parallel.inference_layers")
        return layers is not None and isinstance(module, layers.InferenceRowParallelLinear)

    def _scatters(self, module: nn.Module) -> bool:
        return module.sequence_parallel or not module.training

    def _readers(self) -> dict[type, set[str]]:
        from megatron.core.extensions.transformer_engine import TELinear
        from megatron.core.tensor_parallel.inference_layers import InferenceRowParallelLinear

        return {InferenceRowParallelLinear: {"tp_size"}, TELinear.__base__: {"parallel_mode"}}

    def _otherwise_summed(self, module: nn.Module) -> str | None:
        if getattr(module.config, "inference_fuse_tp_communication", False):
            return (
                "sums, adds and normalizes in one kernel: leave out "
                "--inference-fuse-tp-communication"
            )
        if module.apply_bias:
            return "adds its bias itself (skip_bias_add=False), so its reduction cannot be muted"
        if not isinstance(module.weight, Tensor):
            return (
                f"has its weights as {type(module.weight).__name__} already: low-bit communication "
                "is to be switched on before Megatron converts them"
            )
        return None


def bypassed_by(parent: nn.Module) -> str | None:
    """Why `parent` does without its row-parallel linear's forward pass; None if it does not."""
    for kind in type(parent).__mro__:
        if kind.__name__ in FUSED_MLPS:
            return (
                f"is never called: {kind.__name__} uses its weight and reduces by itself; leave "
                f"out {FUSED_MLPS[kind.__name__]}"
            )
    return None


@cache
def reads_in_forward(kind: type) -> frozenset[str]:
    """The attributes of `self` that the source of ``kind.forward`` reads; none without source."""
    try:
        return attributes_read(textwrap.dedent(inspect.getsource(kind)))
    except OSError:
        return frozenset()


def attributes_read(source: str) -> frozenset[str]:
    """The attributes of `self` that `forward` of the one class in `source` reads."""
    kind: Any = ast.parse(source).body[0]
    return frozenset(
        node.attr
        for method in kind.body
        if isinstance(method, ast.FunctionDef) and method.name == "forward"
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _set(module: nn.Module, values: dict) -> None:
    for name, value in values.items():
        setattr(module, name, value)
