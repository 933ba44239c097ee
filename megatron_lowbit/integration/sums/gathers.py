"""The other half of sequence parallelism: the all-gather before a column-parallel linear.

With sequence parallelism each rank holds a share of the tokens between two sync points, and the
next column-parallel linear (`linear_qkv`, `linear_fc1`) gathers them all. That is an option of its
own (`--lowbit-all-gather BITS`), since it quantizes what is no partial and has no calibrated
outliers: the normalized input, by `rotated-hybrid` without a BF16 index.

A `ColumnParallelLinear` with `explicit_expert_comm` set takes its input as already gathered; a
forward pre-hook gathers it.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from megatron_lowbit.codecs import get_codec
from megatron_lowbit.comm import all_gather
from megatron_lowbit.comm.traffic import Traffic
from megatron_lowbit.integration.compat import ALL_GATHERS, require
from megatron_lowbit.integration.sums.sync_points import transformer_layers


class Gatherer:
    """Gathers one column-parallel linear's input in low bits and counts what it sends."""

    def __init__(self, layer: int, name: str, module: nn.Module, bits: int):
        self.layer, self.name, self.module = layer, name, module
        self.codec = get_codec("rotated-hybrid", bits=bits)
        weight = module.weight
        self.tables = self.codec.tables(weight.shape[1], device=weight.device)
        self.traffic = Traffic()

    def attach(self) -> Callable[[], None]:
        """Gather before the linear from now on; gives what restores Megatron's own all-gather."""
        self.module.explicit_expert_comm = True
        hook = self.module.register_forward_pre_hook(self)

        def undo() -> None:
            hook.remove()
            self.module.explicit_expert_comm = False

        return undo

    def __call__(self, module: nn.Module, inputs: tuple) -> tuple:
        """The forward pre-hook: the input with all ranks' tokens."""
        from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

        x, *others = inputs
        if not module.sequence_parallel:  # engines switch it off for the steps of decoding
            return (copy_to_tensor_model_parallel_region(x, group=module.tp_group), *others)
        return (self._gather(x), *others)

    def _gather(self, x: Tensor) -> Tensor:
        if self.tables.bf16_index.device != x.device:  # the model moved since `apply`
            self.tables = self.tables.to(x.device)
        return all_gather(
            x,
            group=self.module.tp_group,
            codec=self.codec,
            tables=self.tables,
            traffic=self.traffic,
        )


def find_gathers(model: nn.Module | Iterable[nn.Module], bits: int | None) -> list[Gatherer]:
    """A gatherer for each column-parallel linear that gathers its input along the sequence.

    None where `bits` is None: then Megatron's own all-gather stays.

    Raises:
        LowbitError: `rotated-hybrid` has no version of `bits` bits.
    """
    if bits is None:
        return []
    require(ALL_GATHERS)
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    return [
        Gatherer(number, name, module, bits)
        for number, layer in sorted(transformer_layers(model).items())
        for name, module in layer.named_modules()
        if isinstance(module, ColumnParallelLinear)
        and module.sequence_parallel
        and not module.explicit_expert_comm
    ]
