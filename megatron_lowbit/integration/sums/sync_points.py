"""Where a Megatron model sums partials over its tensor-parallel ranks, and how to step in.

A sync point is a row-parallel linear of megatron-core under a layer of the decoder: attention's
`linear_proj`, the MLP's and shared experts' `linear_fc2`, `out_proj` of Mamba and gated delta nets.
A `HybridModel` counts every symbol of its pattern as a layer, so one of its layers may have one
sync point only. How each kind of linear is made to hand over its partial
is in `integration.sums.routes`; a reducer bound to the sync point then sums it, by an all-reduce or
with sequence parallelism by a reduce-scatter. So only registered sync points change:
`reduce_from_tensor_model_parallel_region` and `reduce_scatter_to_sequence_parallel_region`
themselves are left alone, and with them everything else that Megatron sums through those names:
embeddings, token counts, losses, gradients.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.compat import CHAINS, SYNC_POINTS, require
from megatron_lowbit.integration.sums.chains import why_apart
from megatron_lowbit.integration.sums.routes import Route, registered_route, route_of
from megatron_lowbit.integration.sums.shared_experts import (
    called_whole,
    fused_linears,
    note_overlapped,
)
from megatron_lowbit.integration.sums.transformer_engine import bypassed_by
from megatron_lowbit.model.summing import Point, Reducer

# Why some stay native.
ROUTED_EXPERTS = "routed experts, summed by the token dispatcher: --lowbit-experts is for them"
PREDICTION_HEAD = "a multi-token-prediction head, which drafts a token or a few at a time"

# Modules that `attach` has muted, to tell them from those that Megatron has.
_attached: WeakSet[nn.Module] = WeakSet()


def is_attached(module: nn.Module) -> bool:
    """Whether a module has a reducer of ours."""
    return module in _attached


def any_attached() -> bool:
    """Whether any module of this process has a reducer of ours."""
    return bool(_attached)


@dataclass(frozen=True)
class SyncPoint(Point):
    """One row-parallel output that is summed over tensor-parallel ranks.

    Attributes:
        module: The row-parallel linear.
    """

    module: nn.Module = field(kw_only=True)

    @property
    def group(self) -> dist.ProcessGroup:
        return _route(self.module).group(self.module)

    @property
    def hidden(self) -> int:
        # Transformer Engine's linears have the other name.
        return getattr(self.module, "output_size", None) or self.module.out_features

    @property
    def device(self) -> torch.device:
        return self.module.weight.device


def transformer_layers(model: nn.Module | Iterable[nn.Module]) -> dict[int, nn.Module]:
    """The decoder's layers of a model, or of a list of model chunks, by number.

    There may be none: a pipeline stage can hold an embedding or a loss alone.
    """
    from megatron.core.ssm.mamba_layer import MambaLayer  # not a transformer layer in Megatron
    from megatron.core.transformer.transformer_layer import BaseTransformerLayer

    layers: dict[int, nn.Module] = {}
    for path, module in modules_of(model):
        if not isinstance(module, (BaseTransformerLayer, MambaLayer)) or _in_prediction_head(path):
            continue
        if layers.setdefault(module.layer_number, module) is not module:
            raise LowbitError(
                f"{path} is a second layer {module.layer_number}: low-bit communication needs "
                "a model with one stack of layers"
            )
    return layers


def chunk_numbers(model: nn.Module | Iterable[nn.Module]) -> dict[nn.Module, int]:
    """Which chunk of a model each of its modules is in."""
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    return {module: n for n, chunk in enumerate(chunks) for module in chunk.modules()}


def moe_layers(model: nn.Module | Iterable[nn.Module]) -> Iterator[tuple[int, str, nn.Module]]:
    """Layer number, path and module of each MoE of the decoder."""
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer

    for number, layer in sorted(transformer_layers(model).items()):
        for name, module in layer.named_modules():
            if isinstance(module, BaseMoELayer):
                yield number, name, module


def dispatcher_name(moe: str) -> str:
    """The name of an MoE's token dispatcher under its layer."""
    return f"{moe}.token_dispatcher"


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
    require((*SYNC_POINTS, *CHAINS))
    points: list[SyncPoint] = []
    native = {
        f"layer {number} {dispatcher_name(name)}": ROUTED_EXPERTS
        for number, name, _ in moe_layers(model)
    }
    seen: set[nn.Module] = set()
    chunks = chunk_numbers(model)
    for number, layer in sorted(transformer_layers(model).items()):
        note_overlapped(layer)
        fused, whole = fused_linears(layer), called_whole(layer)
        for name, module in layer.named_modules():
            if not _is_row_parallel(name, module):
                continue
            seen.add(module)
            point = SyncPoint(number, name, chunks[layer], why_apart(layer, name), module=module)
            if _is_routed_expert(point):
                continue  # its token dispatcher sums, and is listed
            if module in fused:
                native[str(point)] = "fused shared experts, which sum inside themselves"
            elif module in whole:
                native[str(point)] = "shared experts that the inference dispatcher calls whole"
            elif _is_muted_by_megatron(module):
                native[str(point)] = "already muted by Megatron, which sums it elsewhere"
            else:
                _check_reachable(point, layer.get_submodule(name.rpartition(".")[0]))
                points.append(point)
    native |= _outside_of_layers(model, seen)
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
        if "norm" in name
        and parameter.ndim == 1
        # Mamba's gated norm is split over the ranks.
        and not getattr(parameter, "tensor_model_parallel", False)
    ]
    raw = [v.detach().to("cpu", torch.bfloat16).view(torch.uint8).numpy() for v in vectors]
    digests = sorted(hashlib.sha256(vector.tobytes()).hexdigest() for vector in raw)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def attach(points: Sequence[SyncPoint], reducers: Sequence[Reducer]) -> ExitStack:
    """Let `reducers` sum `points` from now on; closing the result restores Megatron's own way."""
    with ExitStack() as undo:
        for point, reducer in zip(points, reducers, strict=True):
            undo.callback(_route(point.module).attach(point.module, reducer))
            _attached.add(point.module)
            undo.callback(_attached.discard, point.module)
        return undo.pop_all()


def _route(module: nn.Module) -> Route:
    """Of a sync point's module, which has one."""
    route = route_of(module)
    assert route is not None, type(module).__name__
    return route


def _is_row_parallel(name: str, module: nn.Module) -> bool:
    """By the class's and the module's name, so that classes we do not know are seen and refused."""
    by_class = any("RowParallel" in kind.__name__ for kind in type(module).__mro__)
    by_class |= registered_route(module) is not None
    return by_class or name.rpartition(".")[2] in ("linear_proj", "linear_fc2", "out_proj")


def modules_of(model: nn.Module | Iterable[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of all that is in a model or in a list of model chunks."""
    for chunk in [model] if isinstance(model, nn.Module) else model:
        yield from chunk.named_modules()


def _in_prediction_head(path: str) -> bool:
    return "mtp" in path.split(".")


def _outside_of_layers(
    model: nn.Module | Iterable[nn.Module], seen: set[nn.Module]
) -> dict[str, str]:
    """The row-parallel linears of a model beside those `seen`, which stay native, with the reason.

    Heads for multi-token prediction draft a token or a few for each request, from where their
    messages are far below the sizes that low bits pay for, and their errors could only make drafts
    be refused.
    """
    return {
        path: PREDICTION_HEAD if _in_prediction_head(path) else "outside of the decoder's layers"
        for path, module in modules_of(model)
        if module not in seen and _is_row_parallel(path, module)
    }


def _is_routed_expert(point: SyncPoint) -> bool:
    return getattr(point.module, "is_expert", False) or "experts" in point.name.split(".")


def _is_muted_by_megatron(module: nn.Module) -> bool:
    route = route_of(module)
    return route is not None and route.is_muted(module) and module not in _attached


def _check_reachable(point: SyncPoint, parent: nn.Module) -> None:
    module, route = point.module, route_of(point.module)
    if route is None:
        raise LowbitError(
            f"{point} is a {type(module).__name__}, which reduces inside itself: use the local or "
            "Transformer Engine's spec (--transformer-impl local), or register_route for a fork's"
        )
    if module in _attached:
        raise LowbitError(f"{point} is already attached: remove() the first handle before")
    obstacle = bypassed_by(parent) or route.obstacle(module)
    if obstacle:
        raise LowbitError(f"{point} {obstacle}")
