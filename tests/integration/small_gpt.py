"""A small GPTModel of megatron-core and what tests do with it, on the ranks of a group."""

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from releases import is_release

import megatron_lowbit
from megatron_lowbit.calibration.index_files import write_index
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.errors import LowbitError

LAYERS, HIDDEN, HEADS, VOCAB, LENGTH = 2, 96, 6, 120, 24
POINTS = [
    (layer, name)
    for layer in range(1, LAYERS + 1)
    for name in ("self_attention.linear_proj", "mlp.linear_fc2")
]
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 96,
    "moe_shared_expert_intermediate_size": 96,
    "moe_token_dispatcher_type": "allgather",
}


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
    """Of a small model; `config` says more, or other sizes."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if config.get("multi_latent_attention") else TransformerConfig
    fields = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS}
    return kind(
        **{**fields, **config},
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
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


def build(
    dtype: torch.dtype, *, seed: int = 1, bias: bool = False, place: dict | None = None, **config
):
    """A small GPTModel of the local spec, with the same weights at any TP degree.

    `place` is what GPTModel takes to be a stage of a pipeline.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel

    seed_all(seed)
    model = GPTModel(
        transformer_config(dtype, bias=bias, **config),
        layer_spec(config),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        **(place or {}),
    )
    return as_trained(model, dtype)


def whole_logits(model) -> torch.Tensor:
    """Logits of the whole vocabulary for fixed tokens."""
    from megatron_lowbit.model.forward import logits

    tokens = torch.arange(LENGTH) * 7 % VOCAB
    return whole_vocabulary(logits(model, tokens[None])[0])


def whole_vocabulary(mine: torch.Tensor) -> torch.Tensor:
    """The parts of all tensor-parallel ranks side by side, ``[tokens, vocabulary]``."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine.contiguous(), group=group)
    return torch.cat(parts, dim=1)


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


def make_index(model, out: Path, simulate_tp: int | None = None):
    """Calibrate on random tokens, by the same function as tools/calibrate.py."""
    from megatron_lowbit.integration.loops.calibrate_checkpoint import calibrate_model

    sequences = torch.randint(0, VOCAB, (5, LENGTH), generator=torch.Generator().manual_seed(0))
    index, progress = calibrate_model(
        model,
        sequences,
        codec=get_codec("rotated-hybrid"),
        bf16_features=2,
        corpus={"sha256": "0"},
        partial=out / "partial",
        simulate_tp=simulate_tp,
    )
    if dist.get_rank() == 0:
        write_index(index, out / "lowbit")
    dist.barrier()
    return index, progress


def message(step) -> str:
    """The user's error that `step` raises."""
    try:
        step()
    except LowbitError as error:
        return str(error)
    return "no error"


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
