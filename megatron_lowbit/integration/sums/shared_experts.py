"""Shared experts whose `linear_fc2` does not sum its partial itself.

With `moe_shared_expert_overlap` Megatron mutes both linears of the MLP and calls it piece by piece,
on a stream of its own, beside the token dispatcher; the partial is summed in `post_forward_comm`.
That call is where a reducer steps in: the overlap stays as it is.
"""

from collections.abc import Callable
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch.distributed as dist
from torch import nn

from megatron_lowbit.integration.rebinding import bind_in_method
from megatron_lowbit.model.summing import Reducer

# The MLP that each overlapped linear_fc2 belongs to: a module does not know its parent.
_owners: WeakKeyDictionary[nn.Module, ReferenceType[nn.Module]] = WeakKeyDictionary()


def note_overlapped(layer: nn.Module) -> None:
    """Remember the overlapped shared experts of `layer`, so that `OverlapRoute` takes them."""
    whole = called_whole(layer)
    for module in _shared_experts(layer):
        if module.config.moe_shared_expert_overlap and module.linear_fc2 not in whole:
            _owners[module.linear_fc2] = ref(module)


def fused_linears(layer: nn.Module) -> set[nn.Module]:
    """Each `linear_fc2` of `layer` whose weights are used by a fused MLP that sums in itself."""
    return {
        module.linear_fc2
        for module in _shared_experts(layer)
        if getattr(module.config, "use_grouped_gemm_for_shared_expert", False)
    }


def called_whole(layer: nn.Module) -> set[nn.Module]:
    """Each `linear_fc2` of overlapped shared experts that inference calls whole.

    The dispatchers of inference-optimized layers (0.19) do not go through `post_forward_comm`.
    """
    return {
        module.shared_experts.linear_fc2
        for module in layer.modules()
        if hasattr(module, "_inference_token_dispatcher")
        and getattr(module, "shared_experts", None) is not None
        and module.config.moe_shared_expert_overlap
    }


def _shared_experts(layer: nn.Module) -> list[nn.Module]:
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    return [module for module in layer.modules() if isinstance(module, SharedExpertMLP)]


class OverlapRoute:
    """`linear_fc2` of shared experts that run beside the token dispatcher."""

    def takes(self, module: nn.Module) -> bool:
        return module in _owners

    def obstacle(self, module: nn.Module) -> str | None:
        return None

    def is_muted(self, module: nn.Module) -> bool:
        return False  # its owner sums

    def group(self, module: nn.Module) -> dist.ProcessGroup:
        from megatron.core import parallel_state

        owner = _owners[module]()
        assert owner is not None, "it has its linear"
        # Before 0.16 it has none of its own.
        return getattr(owner, "tp_group", None) or parallel_state.get_tensor_model_parallel_group()

    def attach(self, module: nn.Module, reduce: Reducer) -> Callable[[], None]:
        from megatron.core.transformer.moe import shared_experts

        return bind_in_method(
            _owners[module](),
            "post_forward_comm",
            shared_experts,
            reduce_from_tensor_model_parallel_region=lambda x, group=None: reduce(x, False),
            reduce_scatter_to_sequence_parallel_region=lambda x, group=None: reduce(x, True),
        )
