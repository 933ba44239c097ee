"""Which sync points carry their errors to the next: the chain of a model chunk.

A sync point is in its chunk's chain if its sum is added as it is to the residual stream that the
next one adds to, for the same tokens. In megatron-core nearly all are. What stands between a sum
and the stream is told by structure, and by the code that would run: a layer's own
bias-dropout-add, forward methods that are not megatron-core's, gates, hooks, children that we do
not know. A sync point outside the chain neither takes nor gives, and the carry passes it by.

Source: `TransformerLayer`, `MoETransformerLayer`, `MambaLayer` of megatron-core 0.13.1 to 0.19.2.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from megatron_lowbit.codecs import Codec
from megatron_lowbit.comm.feedback.chain import SLOTS, Chain, Step
from megatron_lowbit.integration.sums.routes import registered_route
from megatron_lowbit.model.summing import chains

# The first part of a sync point's name -> the layer's function that adds its sum to the stream.
_ADDED_BY = {
    "self_attention": "self_attn_bda",
    "cross_attention": "cross_attn_bda",
    "mlp": "mlp_bda",
    "mixer": "mamba_bda",
}
_CHILDREN = {
    *_ADDED_BY,
    *_ADDED_BY.values(),
    *("input_layernorm", "pre_cross_attn_layernorm", "pre_mlp_layernorm", "norm"),
}
_METHODS = ("__call__", "forward", "_forward_attention", "_forward_mlp", "_forward_post_mlp")
# Whose code is known. A method of ours is that of simulated ranks.
_KNOWN = ("megatron.core", "transformer_engine", "torch.nn", "megatron_lowbit")


def why_apart(layer: nn.Module, name: str) -> str:
    """Why the sync point `name` of `layer` is outside the chain; empty if it is in it."""
    owner = layer.get_submodule(name.rpartition(".")[0])
    gate = "a gate scales its sum" if getattr(owner, "use_shared_expert_gate", False) else ""
    return _by_layer(layer, name) or _by_path(layer, name) or gate


def _by_layer(layer: nn.Module, name: str) -> str:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    config = layer.config
    if getattr(config, "enable_mhc_connections", False):
        return "hyper-connections mix the stream"
    part = name.partition(".")[0]
    if part not in _ADDED_BY:
        return f"{part} is no part of a layer that we know"
    if getattr(layer, _ADDED_BY[part], None) is not get_bias_dropout_add:
        return f"its {_ADDED_BY[part]} is not Megatron's own"
    if part == "mlp" and getattr(config, "mlp_chunks_for_prefill", 1) > 1:
        return "the MLP runs in chunks of the prompt"
    for method in _METHODS:
        function = getattr(type(layer), method, None)
        if function is not None and not _is_known(function):
            return f"{type(layer).__name__} has a {method} of its own"
    for child, inside in layer.named_children():
        known = child in _CHILDREN or child.startswith("cudagraph_manager")
        if not known and next(inside.parameters(), None) is not None:
            return f"{type(layer).__name__} has a child {child} that we do not know"
    return ""


def _by_path(layer: nn.Module, name: str) -> str:
    """What the modules from the layer down to the linear do besides."""
    inside = layer
    registered = registered_route(layer.get_submodule(name))
    if registered is not None and not registered.in_chain:
        return f"{registered} was registered as outside of it"
    for part in ("", *name.split(".")):
        inside = getattr(inside, part) if part else layer
        if registered is not None and inside is layer.get_submodule(name):
            return ""  # who registered it answers for the linear itself
        kind = type(inside).__name__
        if "forward" in vars(inside) and not _is_known(type(vars(inside)["forward"])):
            return f"the forward of its {kind} was replaced"
        if not _is_known(type(inside).forward):
            return f"{kind} has a forward of its own"
        if any(not _is_known(hook) for hook in inside._forward_hooks.values()):
            return f"its {kind} has a forward hook"
    return ""


def _is_known(code: object) -> bool:
    """Whether a function or a class is Megatron's, Transformer Engine's, torch's or ours."""
    where = getattr(code, "__module__", None) or ""
    return where.startswith(_KNOWN)


@dataclass
class Link:
    """One sync point's place in a chain, over real ranks (`comm.feedback.Feedback`).

    Attributes:
        chain: Of its model chunk.
        place: In the chain, from 0.
        gives: Whether another one follows.
        needs: Whether the one before sends nothing.
        module: The sync point's linear.
    """

    chain: Chain
    place: int
    gives: bool
    needs: bool
    module: nn.Module

    def serving(self, partial: Tensor) -> "Link | None":
        """This link in inference; None, said once, where the model trains or is recorded."""
        if not self.module.training and not (torch.is_grad_enabled() and partial.requires_grad):
            return self
        _say_once()
        return None

    def step(self, x: Tensor, hidden: int) -> Step:
        """What it takes and gives in this call."""
        return self.chain.step(self.place, x, hidden, gives=self.gives, needs=self.needs)

    def by_native(self) -> bool:
        """It goes native: noted, unless something is, or must be, owed to it."""
        return not self.needs and self.chain.by_native(self.place)


def links(points: Sequence, codecs: Sequence[Codec]) -> list[Link | None]:
    """A link for each sync point that carries, with chains of its own; None for the others."""
    made: list[Link | None] = [None] * len(points)
    for chain in chains(points):
        carries = Chain(max(SLOTS, _most_in_a_layer([points[n] for n in chain]) + 1))
        for place, number in enumerate(chain):
            needs = place > 0 and codecs[chain[place - 1]].bits == 0
            made[number] = Link(
                carries, place, place < len(chain) - 1, needs, points[number].module
            )
    return made


def bytes_a_token(points: Sequence, ranks: int, *, sums: bool) -> int:
    """Of all carries of this rank: three partials a chain, and with sums a share of three more."""
    bf16 = torch.bfloat16.itemsize
    partials = sum(SLOTS * bf16 * points[chain[0]].hidden for chain in chains(points))
    return partials + partials // ranks if sums else partials


@cache
def _say_once() -> None:
    warnings.warn(
        "megatron_lowbit: no error feedback where a model trains or its gradients are recorded: "
        "call model.eval(), and run it under torch.inference_mode()",
        RuntimeWarning,
        stacklevel=4,
    )


def _most_in_a_layer(points: Sequence) -> int:
    return max(Counter(point.layer for point in points).values())
