"""A small GPTModel of megatron-core and what tests do with it, on the ranks of a group."""

import contextlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from on_ranks import directory_of_all
from releases import is_release

import megatron_lowbit
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.errors import LowbitError

LAYERS, HIDDEN, HEADS, VOCAB, LENGTH = 2, 96, 6, 120, 24
ATTENTION, MLP = "self_attention.linear_proj", "mlp.linear_fc2"
SHARED_EXPERTS = "mlp.shared_experts.linear_fc2"
TOKENS = (torch.arange(LENGTH) * 7 % VOCAB)[None]
POINTS = [(layer, name) for layer in (1, 2) for name in (ATTENTION, MLP)]
MOE = {  # with shared experts
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 96,
    "moe_shared_expert_intermediate_size": 96,
    "moe_token_dispatcher_type": "allgather",
    "moe_aux_loss_coeff": 0.01,
}
OVERLAP = {**MOE, "moe_token_dispatcher_type": "alltoall", "moe_shared_expert_overlap": True}


def start_megatron(release: str, ranks: int | None = None, **degrees: int) -> None:
    """Megatron's groups, tensor parallel over all ranks where not said; `release` is running."""
    import megatron.core
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    assert is_release(megatron.core.__version__, release)
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 forgets it where Transformer Engine is missing
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(ranks or dist.get_world_size(), **degrees)


class RMSNorm(torch.nn.RMSNorm):
    """Megatron's torch norms refuse sequence parallelism, which asks nothing of a norm here."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps)


def layer_spec(config: dict):
    """The local spec, with norms that take sequence parallelism where it is asked for."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    spec = get_gpt_layer_local_spec(
        config.get("num_moe_experts"),
        multi_latent_attention=config.get("multi_latent_attention", False),
        normalization="RMSNorm",
    )
    if not config.get("sequence_parallel"):
        return spec
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * LAYERS, layer_norm=RMSNorm)


def seed_all(seed: int) -> None:
    """Torch's generator and Megatron's, which 0.13 has no way to make anew: it is emptied."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    reset = {"force_reset_rng": True}
    if "force_reset_rng" not in inspect.signature(model_parallel_cuda_manual_seed).parameters:
        reset = {}
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, **reset)
    torch.manual_seed(seed)


def transformer_config(dtype: torch.dtype, *, bias: bool = False, **config):
    """Of a small model, split as Megatron's groups are; `config` says more, or other sizes."""
    from megatron.core import parallel_state as state
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if config.get("multi_latent_attention") else TransformerConfig
    fields = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS}
    for degree in ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor"):
        size = getattr(state, f"get_{degree}_parallel_world_size")()
        fields[f"{degree}_parallel_size"] = size
    return kind(
        **{**fields, **config},
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        add_bias_linear=bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        normalization="RMSNorm",
        masked_softmax_fusion=False,
    )


def as_trained(model, dtype: torch.dtype):
    """Norms and biases as a trained model has them: not all one or zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or (name.endswith("bias") and "linear_proj" in name):
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.to(dtype).eval()


def gpt_model(config, spec, **place):
    """A GPTModel of a layer's spec, with heads that guess tokens if the config asks for them."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    sizes = {"vocab_size": VOCAB, "max_sequence_length": LENGTH, "position_embedding_type": "rope"}
    if config.mtp_num_layers:
        heads = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
        sizes["mtp_block_spec"] = heads
    return GPTModel(config, spec, **sizes, **place)


def build(
    dtype: torch.dtype,
    *,
    seed: int = 1,
    bias: bool = False,
    attention: type | None = None,
    place: dict | None = None,
    **config,
):
    """A small GPTModel of the local spec, with the same weights at any TP degree.

    Args:
        attention: Core attention, if not megatron-core's own.
        place: What GPTModel takes to be a stage of a pipeline, or to share its embeddings.
    """
    seed_all(seed)
    made, spec = transformer_config(dtype, bias=bias, **config), layer_spec(config)
    if attention is not None:
        spec.submodules.self_attention.submodules.core_attention = attention
    return as_trained(gpt_model(made, spec, **(place or {})), dtype)


def whole_logits(model) -> torch.Tensor:
    """Logits of the whole vocabulary for fixed tokens."""
    from megatron_lowbit.model.forward import logits

    return whole_vocabulary(logits(model, TOKENS)[0])


def in_training(model) -> torch.Tensor:
    """The same of this rank's part of the vocabulary, with gradients: the model's own are none."""
    from megatron.core import parallel_state

    from megatron_lowbit.model.forward import forward

    # Megatron's buffer for all-gathers: one made in inference mode cannot be written outside it.
    parallel_state.get_global_memory_buffer().buffer.clear()
    model.zero_grad()
    return forward(model, TOKENS)


def whole_vocabulary(mine: torch.Tensor) -> torch.Tensor:
    """The parts of all tensor-parallel ranks side by side, ``[tokens, vocabulary]``."""
    from megatron.core import parallel_state

    return torch.cat(gathered(mine, parallel_state.get_tensor_model_parallel_group()), dim=1)


def gathered(mine: torch.Tensor, group) -> list[torch.Tensor]:
    """Every rank's."""
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine.contiguous(), group=group)
    return parts


def native_calls(model) -> int:
    """How often one forward pass calls the all-reduce that RowParallelLinear imports by value."""
    from megatron.core.tensor_parallel import layers

    name = "reduce_from_tensor_model_parallel_region"
    with pytest.MonkeyPatch.context() as patch:
        original, calls = getattr(layers, name), []
        patch.setattr(layers, name, lambda *args, **kw: calls.append(1) or original(*args, **kw))
        whole_logits(model)
    return len(calls)


def fp32_accumulation(model) -> torch.Tensor:
    """Logits with Megatron's partials summed in fp32 instead of the model's dtype."""
    from megatron_lowbit.integration.sums.sync_points import attach, find_sync_points

    def reduce(partial, scatter):
        total = partial.float()
        dist.all_reduce(total, group=group)
        total = total.to(partial.dtype)
        return total.chunk(group.size())[group.rank()] if scatter else total

    points, _ = find_sync_points(model)
    group = points[0].group
    with attach(points, [reduce] * len(points)):
        return whole_logits(model)


@contextlib.contextmanager
def low(model, index, **wishes) -> Iterator:
    """The handle of a model in low bits, one-shot where nothing is said."""
    handle = megatron_lowbit.apply(model, index, **{"collective": "one-shot", **wishes})
    try:
        yield handle
    finally:
        handle.remove()


def make_index(
    model,
    partial: Path,
    *,
    codec: str = "rotated-hybrid",
    bf16_features: int = 2,
    simulate_tp: int | None = None,
):
    """Calibrate on random tokens, by the same function as tools/calibrate.py."""
    from megatron_lowbit.integration.loops.calibrate_checkpoint import calibrate_model

    return calibrate_model(
        model,
        torch.randint(0, VOCAB, (5, LENGTH), generator=torch.Generator().manual_seed(0)),
        codec=get_codec(codec),
        bf16_features=bf16_features,
        corpus={"sha256": "0"},
        partial=partial,
        simulate_tp=simulate_tp,
    )


def index_of(model, **wishes):
    """A calibration index, which is not written."""
    leave_engine_mode()
    return make_index(model, directory_of_all("partial"), **wishes)[0]


def leave_engine_mode() -> None:
    """Engines set a flag of the process that changes plain forward passes."""
    with contextlib.suppress(ImportError):
        from megatron.core.inference.utils import InferenceMode

        InferenceMode.unset_active()


def rules(*given: dict) -> Path:
    """A recipe's file with these rules, of this rank."""
    path = directory_of_all(f"rank {dist.get_rank()}") / "rules.json"
    path.write_text(json.dumps(given))
    return path


def message(step) -> str:
    """The user's error that `step` raises."""
    try:
        step()
    except LowbitError as error:
        return str(error)
    return "no error"


def refusal(model, index, **wishes) -> str:
    """The user's error of `apply`."""
    return message(lambda: megatron_lowbit.apply(model, index, **wishes).remove())


def of_all_ranks(value) -> list:
    """The values by rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def assert_alike(value: torch.Tensor) -> None:
    """The same bits on all ranks."""
    assert all(torch.equal(value, other) for other in of_all_ranks(value))


def alike(value):
    """What is the same on all ranks, and no tensor."""
    assert all(value == other for other in of_all_ranks(value))
    return value
