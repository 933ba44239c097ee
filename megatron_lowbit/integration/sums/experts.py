"""Routed experts: the sums that Megatron's token dispatchers make of their outputs.

A dispatcher brings each token to the ranks of its experts, and the experts' outputs back, summed by
one reduce-scatter: over all expert ranks (`allgather`), or over the ranks that share each expert
(`alltoall` with expert tensor parallelism). That is an option of its own (`--lowbit-experts BITS`),
since which tokens an expert gets depends on the batch, so that calibration has no fixed tensor to
watch: `rotated-hybrid` without a BF16 index does the sum. Whatever else a dispatcher sends
(tokens to experts, routing maps, token counts, outputs back by all-to-all) stays native, as do the
router's counts and auxiliary losses, which go nowhere near it.
"""

from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch import Tensor, nn

from megatron_lowbit.codecs import get_codec
from megatron_lowbit.comm import reduce_scatter
from megatron_lowbit.comm.traffic import Traffic
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.rebinding import bind_in_method
from megatron_lowbit.integration.sums.sync_points import dispatcher_name, moe_layers

# Each dispatcher's only method with a reduce-scatter.
_METHODS = {
    "MoEAllGatherTokenDispatcher": "token_combine",
    "MoEAlltoAllTokenDispatcher": "combine_preprocess",
}


class ExpertSum:
    """Sums one MoE layer's routed outputs in low bits and counts what it sends."""

    def __init__(self, layer: int, name: str, moe: nn.Module, bits: int):
        self.layer, self.name, self.dispatcher = layer, name, moe.token_dispatcher
        self.codec = get_codec("rotated-hybrid", bits=bits)
        config, device = moe.config, next(moe.parameters()).device
        hidden = getattr(config, "moe_latent_size", None) or config.hidden_size
        self.tables = self.codec.tables(hidden, device=device)
        self.traffic = Traffic()

    def __str__(self) -> str:
        return f"layer {self.layer} {self.name}"

    def attach(self) -> Callable[[], None]:
        """Sum from now on; gives what restores Megatron's own reduce-scatter.

        Raises:
            LowbitError: A release of Megatron whose dispatchers sum elsewhere.
        """
        from megatron.core.transformer.moe import token_dispatcher

        method = _METHODS[type(self.dispatcher).__name__]
        names = {"reduce_scatter_to_sequence_parallel_region": self}
        return bind_in_method(self.dispatcher, method, token_dispatcher, **names)

    def __call__(
        self,
        x: Tensor,
        group: dist.ProcessGroup | None = None,
        input_split_sizes: list[int] | None = None,
    ) -> Tensor:
        """In the place of `reduce_scatter_to_sequence_parallel_region`."""
        if self.tables.bf16_index.device != x.device:  # the model moved since `apply`
            self.tables = self.tables.to(x.device)
        return reduce_scatter(
            x,
            group=group,
            codec=self.codec,
            tables=self.tables,
            traffic=self.traffic,
            counts=input_split_sizes,
        )


def find_expert_sums(model: nn.Module | Iterable[nn.Module], bits: int | None) -> list[ExpertSum]:
    """A low-bit sum for each MoE layer whose token dispatcher sums over ranks.

    None where `bits` is None: then Megatron's own sums stay.

    Raises:
        LowbitError: A dispatcher that sums inside kernels of its own, or `rotated-hybrid` has no
            version of `bits` bits.
    """
    if bits is None:
        return []
    found = []
    for layer, name, moe in moe_layers(model):
        one = ExpertSum(layer, dispatcher_name(name), moe, bits)
        kind = type(one.dispatcher).__name__
        if kind not in _METHODS or hasattr(moe, "_inference_token_dispatcher"):
            raise LowbitError(
                f"--lowbit-experts: {one} is a {kind}, which sums inside its own kernels: leave it "
                "out, or use --moe-token-dispatcher-type allgather or alltoall"
            )
        if _sums(one.dispatcher):
            found.append(one)
    return found


def _sums(dispatcher) -> bool:
    """Whether a dispatcher has several ranks to sum over."""
    gathers = type(dispatcher).__name__ == "MoEAllGatherTokenDispatcher"
    return dispatcher.tp_size > 1 or (gathers and dispatcher.ep_size > 1)
