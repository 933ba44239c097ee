"""`HybridModel` of the local spec: layers of attention, MLP, MoE, Mamba by a pattern.

Megatron has its layer specs with Transformer Engine only, whose linears fuse the norm before them
and reduce inside themselves. `local_stack_spec` is the same stack of megatron-core's own modules,
with the names of the fused ones in checkpoints, so that a checkpoint serves both. Mamba and gated
delta nets (`M`, `G`) still need the kernels that Megatron needs for them (mamba-ssm, causal-conv1d,
flash-linear-attention), which want CUDA; attention, MLP and MoE (`*`, `-`, `E`) run anywhere. MLA
and sparse attention (`+`, `D`) exist with Transformer Engine only: megatron-core's own attention
does not take them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.rebinding import rebound

# Symbols of a pattern: layers, and separators of pipeline stages and prediction heads.
_LOCAL = set("*-EMG|/")
# What a layer of a GPTModel has of each kind.
_ATTENTION = ("input_layernorm", "self_attention", "self_attn_bda")
_FEED_FORWARD = ("pre_mlp_layernorm", "mlp", "mlp_bda")


def local_stack_spec(config, pattern: str):
    """The ModuleSpec of a HybridStack of megatron-core's own modules.

    Args:
        config: The model's TransformerConfig.
        pattern: Its layers, as `--hybrid-layer-pattern` has them.

    Raises:
        LowbitError: A layer that Megatron has with Transformer Engine only. (Megatron itself would
            leave it out without a word.)
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer

    missing = sorted(set(pattern) - _LOCAL)
    if missing:
        raise LowbitError(
            f"--hybrid-layer-pattern {pattern}: layers {', '.join(missing)} need "
            "--transformer-impl transformer_engine"
        )
    kind = {"qk_layernorm": config.qk_layernorm, "normalization": config.normalization}
    plain = get_gpt_layer_local_submodules(**kind)
    norm = plain.input_layernorm
    layers = HybridStackSubmodules(
        attention_layer=_layer(TransformerLayer, plain, _ATTENTION),
        mlp_layer=_layer(MLPLayer, plain, _FEED_FORWARD),
        mamba_layer=_mamba_layer(norm),
        gdn_layer=_gdn_layer(norm),
        mtp_block_spec=_prediction_heads(norm),
    )
    if config.num_moe_experts:
        routed = get_gpt_layer_local_submodules(config.num_moe_experts, **kind)
        # Not even Transformer Engine fuses a norm into experts: it keeps its name.
        routed.sharded_state_dict_keys_map = {}
        layers = replace(layers, moe_layer=_layer(MoETransformerLayer, routed, _FEED_FORWARD))
    return ModuleSpec(module=HybridStack, submodules=layers)


@contextmanager
def local_final_norm() -> Iterator[None]:
    """Within the context a HybridStack is built with torch's norm where TE is missing.

    HybridStack takes its last norm from Transformer Engine whatever its spec says.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    with rebound(hybrid_block, **({} if HAVE_TE else {"TENorm": WrappedTorchNorm})):
        yield


def _layer(module: type, whole, names: tuple[str, ...]):
    """A layer with some of the submodules of `whole`, and their names in checkpoints."""
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    in_checkpoints = whole.sharded_state_dict_keys_map.items()
    parts = TransformerLayerSubmodules(
        **{name: getattr(whole, name) for name in names},
        sharded_state_dict_keys_map={k: v for k, v in in_checkpoints if k[:-1] in names},
    )
    return ModuleSpec(module=module, submodules=parts)


def _mamba_layer(norm: type):
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec

    linears = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=norm,
            mixer=ModuleSpec(module=MambaMixer, submodules=linears),
            mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
        ),
    )


def _gdn_layer(norm: type):
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    parts = GatedDeltaNetSubmodules(
        in_proj=ColumnParallelLinear, out_norm=norm, out_proj=RowParallelLinear
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(module=GatedDeltaNet, submodules=parts),
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.in_proj.layer_norm_",
            },
        ),
    )


def _prediction_heads(norm: type):
    """Norms and projection of multi-token prediction; its layers are those of the stack."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.multi_token_prediction import (
        MultiTokenPredictionBlock,
        MultiTokenPredictionBlockSubmodules,
        MultiTokenPredictionLayer,
        MultiTokenPredictionLayerSubmodules,
    )
    from megatron.core.transformer.spec_utils import ModuleSpec

    parts = MultiTokenPredictionLayerSubmodules(
        enorm=norm, hnorm=norm, eh_proj=ColumnParallelLinear, mtp_model_layer=None, layer_norm=norm
    )
    layer = ModuleSpec(module=MultiTokenPredictionLayer, submodules=parts)
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer]),
    )
