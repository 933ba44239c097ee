"""The small GPTModel in layers of Transformer Engine, which in tests is te_stand_in's.

All of Megatron's classes are megatron-core's own, its attention the one that runs on a CPU.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from small_gpt import gpt_model, whole_logits

FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
COLLECTIVES = ("allreduce", "reduce_scatter_along_first_dim")


def te_spec(**wishes):
    from megatron.core.models.gpt import gpt_layer_specs

    spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**wishes)
    return _with_local_attention(spec)


def inference_spec():
    """Of the inference-optimized layers."""
    from megatron.core.models.gpt import gpt_layer_specs

    return _with_local_attention(gpt_layer_specs.get_gpt_layer_with_inference_spec())


def _with_local_attention(spec):
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    spec.submodules.self_attention.submodules.core_attention = DotProductAttention
    return spec


def same_weights(local, spec):
    """A model of another spec with the weights of a local one."""
    model, state = gpt_model(local.config, spec), {}
    for name, value in local.state_dict().items():
        for theirs, fused in FUSED_NORMS.items():
            name = name.replace(theirs, fused)
        state[name] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("_extra_state") for name in missing), missing
    return model.to(torch.bfloat16).eval()


@contextmanager
def counting() -> Iterator[list[str]]:
    """A list that grows by the name of each collective that TE's and Megatron's TE layers call."""
    from megatron.core.tensor_parallel import inference_layers
    from transformer_engine.pytorch.module import linear

    def counted(name, original):
        return lambda *args, **kwargs: calls.append(name) or original(*args, **kwargs)

    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for module, name in itertools.product((linear, inference_layers), COLLECTIVES):
            if hasattr(module, name):
                patch.setattr(module, name, counted(name, getattr(module, name)))
        yield calls


def logits_and_calls(model) -> tuple[torch.Tensor, list[str]]:
    with counting() as calls:
        return whole_logits(model), calls
