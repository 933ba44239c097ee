from transformer_engine.pytorch import constants, cpp_extensions, distributed, fp8, ops
from transformer_engine.pytorch.module.grouped_linear import GroupedLinear
from transformer_engine.pytorch.module.layernorm_linear import LayerNormLinear
from transformer_engine.pytorch.module.linear import Linear
from transformer_engine.pytorch.module.norms import RMSNorm


class DotProductAttention:
    """A base class for megatron.core; the tests' layers have Megatron's own attention."""


__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "constants",
    "cpp_extensions",
    "distributed",
    "fp8",
    "ops",
]
