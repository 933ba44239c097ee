"""Where a Megatron model sums partials over its tensor-parallel ranks, and how to step in.

A sync point is a row-parallel linear of megatron-core under a transformer layer: attention's
`linear_proj` and the MLP's `linear_fc2`. How each kind of linear is made to hand over its partial
is in `integration.routes`; a reducer bound to the sync point then sums it, by an all-reduce or with
sequence parallelism by a reduce-scatter. So only registered sync points change:
`reduce_from_tensor_model_parallel_region` and `reduce_scatter_to_sequence_parallel_region`
themselves are left alone, and with them everything else that Megatron sums through those names:
embeddings, token counts, losses, gradients.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.compat import SYNC_POINTS, require
from megatron_lowbit.integration.routes import Reducer, route_of
from megatron_lowbit.integration.transformer_engine import bypassed_by

# Modules that an Attachment has muted, to tell them from those that Megatron has.
_attached: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class SyncPoint:
    """One row-parallel output that is summed over tensor-parallel ranks.

    Attributes:
        layer: Megatron's layer number: from 1, over all pipeline stages.
        name: Its path under the layer, such as ``mlp.linear_fc2``.
        module: The row-parallel linear.
    """

    layer: int
    name: str
    module: nn.Module

    def __str__(self) -> str:
        return f"layer {self.layer} {self.name}"

    @property
    def group(self) -> dist.ProcessGroup:
        """The tensor-parallel group that it sums over."""
        return route_of(self.module).group(self.module)


def transformer_layers(model: nn.Module | Iterable[nn.Module]) -> dict[int, nn.Module]:
    """The decoder's transformer layers of a model, or of a list of model chunks, by number.

    There may be none: a pipeline stage can hold an embedding or a loss alone.
    """
    from megatron.core.transformer.transformer_layer import BaseTransformerLayer

    layers = {}
    for chunk in [model] if isinstance(model, nn.Module) else model:
        for path, module in chunk.named_modules():
            if not isinstance(module, BaseTransformerLayer) or "mtp" in path.split("."):
                continue
            if layers.setdefault(module.layer_number, module) is not module:
                raise LowbitError(
                    f"{path} is a second layer {module.layer_number}: low-bit communication needs "
                    "a model with one stack of layers"
                )
    return layers


def find_sync_points(
    model: nn.Module | Iterable[nn.Module],
) -> tuple[list[SyncPoint], dict[str, str]]:
    """Find the sync points of a model that is whole on this rank's tensor-parallel group.

    Returns:
        The sync points in order, and the row-parallel linears that stay native with the reason.

    Raises:
        LowbitError: A row-parallel linear that cannot be reached, or there is no sync point.
    """
    points, native = sync_points_here(model)
    if not points:
        raise LowbitError(why_none(model, native))
    return points, native


def sync_points_here(
    model: nn.Module | Iterable[nn.Module],
) -> tuple[list[SyncPoint], dict[str, str]]:
    """As `find_sync_points`, of this pipeline stage: there may be none."""
    require(SYNC_POINTS)
    points: list[SyncPoint] = []
    native = _prediction_heads(model)
    for number, layer in sorted(transformer_layers(model).items()):
        for name, module in layer.named_modules():
            if not _is_row_parallel(name, module):
                continue
            point = SyncPoint(number, name, module)
            reason = _reason_for_native(point)
            if reason:
                native[str(point)] = reason
            else:
                _check_reachable(point, layer.get_submodule(name.rpartition(".")[0]))
                points.append(point)
    return points, native


def why_none(model: nn.Module | Iterable[nn.Module], native: dict[str, str]) -> str:
    """Why a model has no sync point, to be said if it has none on any pipeline stage."""
    if transformer_layers(model):
        return f"the model has no sync point that could use low bits: {native or 'none'}"
    return (
        f"{type(model).__name__} has no Megatron-core transformer layer: low-bit communication "
        "needs a megatron-core model such as GPTModel"
    )


def fingerprint(layer: nn.Module) -> str:
    """Digest of a layer's norm weights, in BF16.

    They are the same on every tensor-parallel rank, whatever the TP degree and the layer spec, and
    differ between trained models of the same shape.
    """
    vectors = [
        parameter
        for name, parameter in layer.named_parameters()
        if "norm" in name and parameter.ndim == 1
    ]
    raw = [v.detach().to("cpu", torch.bfloat16).view(torch.uint8).numpy() for v in vectors]
    digests = sorted(hashlib.sha256(vector.tobytes()).hexdigest() for vector in raw)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


class Attachment:
    """Reducers bound to sync points; `remove` gives the modules back as they were."""

    def __init__(self, points: list[SyncPoint], reducers: list[Reducer]):
        self._modules = [point.module for point in points]
        self._undo = []
        for module, reducer in zip(self._modules, reducers, strict=True):
            self._undo.append(route_of(module).attach(module, reducer))
            _attached.add(module)

    def remove(self) -> None:
        """Restore Megatron's own reduction. A second call does nothing."""
        for module, undo in zip(self._modules, self._undo, strict=True):
            undo()
            _attached.discard(module)
        self._modules, self._undo = [], []


def _is_row_parallel(name: str, module: nn.Module) -> bool:
    """By the class's and the module's name, so that classes we do not know are seen and refused."""
    by_class = any("RowParallel" in kind.__name__ for kind in type(module).__mro__)
    return by_class or name.rpartition(".")[2] in ("linear_proj", "linear_fc2")


def _prediction_heads(model: nn.Module | Iterable[nn.Module]) -> dict[str, str]:
    """The row-parallel linears of multi-token-prediction heads, which stay native."""
    found = {}
    for chunk in [model] if isinstance(model, nn.Module) else model:
        for path, module in chunk.named_modules():
            if "mtp" in path.split(".") and _is_row_parallel(path, module):
                found[path] = "a multi-token-prediction head"
    return found


def _reason_for_native(point: SyncPoint) -> str | None:
    module = point.module
    if getattr(module, "is_expert", False) or "experts" in point.name.split("."):
        return "a routed expert's output, summed by the token dispatcher"
    route = route_of(module)
    if route is not None and route.is_muted(module) and module not in _attached:
        return "already muted by Megatron, which sums it elsewhere"
    return None


def _check_reachable(point: SyncPoint, parent: nn.Module) -> None:
    module, route = point.module, route_of(point.module)
    if route is None:
        raise LowbitError(
            f"{point} is a {type(module).__name__}, which reduces inside itself: low-bit "
            "communication needs the local or Transformer Engine's spec (--transformer-impl local)"
        )
    if module in _attached:
        raise LowbitError(f"{point} is already attached: remove() the first handle before")
    obstacle = bypassed_by(parent) or route.obstacle(module)
    if obstacle:
        raise LowbitError(f"{point} {obstacle}")
