"""Models of the newest release with each kind of layer that it sums in, split in each way."""

import small_gpt
import torch
import torch.distributed as dist
from small_gpt import LENGTH, VOCAB, as_trained, layer_spec, seed_all, transformer_config
from torch import Tensor, nn

ATTENTION, MLP = "self_attention.linear_proj", "mlp.linear_fc2"
SHARED_EXPERTS = "mlp.shared_experts.linear_fc2"
DENSE = [(layer, name) for layer in (1, 2) for name in (ATTENTION, MLP)]
MOE = {**small_gpt.MOE, "moe_aux_loss_coeff": 0.01}  # with shared experts
OVERLAP = {**MOE, "moe_token_dispatcher_type": "alltoall", "moe_shared_expert_overlap": True}


def gpt(*, seed: int = 1, attention: type | None = None, place: dict | None = None, **config):
    """A GPTModel of the local spec, in BF16; `place` has arguments of its own."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    seed_all(seed)
    made, spec = transformer_config(torch.bfloat16, **_degrees(), **config), layer_spec(config)
    if attention is not None:
        spec.submodules.self_attention.submodules.core_attention = attention
    heads = None
    if made.mtp_num_layers:
        heads = get_gpt_mtp_block_spec(made, spec, use_transformer_engine=False)
    sizes = {"vocab_size": VOCAB, "max_sequence_length": LENGTH}
    sizes |= {"position_embedding_type": "rope", "mtp_block_spec": heads}
    return as_trained(GPTModel(made, spec, **sizes, **(place or {})), torch.bfloat16)


def hybrid(pattern: str, **config):
    """A HybridModel of the local spec, in BF16."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_lowbit.integration.runtime.hybrid import local_final_norm, local_stack_spec

    seed_all(1)
    made = transformer_config(
        torch.bfloat16,
        num_layers=len(pattern.split("/")[0]),
        is_hybrid_model=True,
        use_mamba_mem_eff_path=False,
        mamba_state_dim=16,
        mamba_head_dim=16,
        mamba_num_groups=2,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        activation_func=nn.functional.silu,
        gated_linear_unit=True,
        **_degrees(),
        **config,
    )
    # Gated delta nets then run Megatron's own torch code; the config itself wants CUDA's settings.
    made.deterministic_mode = True
    sizes = {"vocab_size": VOCAB, "max_sequence_length": LENGTH, "position_embedding_type": "rope"}
    with local_final_norm():
        spec = local_stack_spec(made, pattern)
        return as_trained(
            HybridModel(made, spec, hybrid_layer_pattern=pattern, **sizes), torch.bfloat16
        )


def _degrees() -> dict[str, int]:
    """Of parallelism, as Megatron's groups have them."""
    from megatron.core import parallel_state as state

    return {
        "pipeline_model_parallel_size": state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": state.get_context_parallel_world_size(),
        "expert_model_parallel_size": state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": state.get_expert_tensor_parallel_world_size(),
    }


class CausalAttention(nn.Module):
    """Core attention for what megatron-core's own does not take: MLA and context parallelism.

    With context parallelism each rank has chunk `rank` and chunk ``2 ranks - 1 - rank`` of the
    sequence, as Megatron deals them out; keys and values are gathered.
    """

    def __init__(self, config, *, softmax_scale=None, pg_collection=None, **kwargs):
        super().__init__()
        self.scale, self.group = softmax_scale, pg_collection.cp

    def forward(self, query, key, value, attention_mask, **kwargs) -> Tensor:
        key, value = (whole_sequence(t, self.group) for t in (key, value))
        places = my_share(torch.arange(len(key)), self.group)
        mask = places[:, None] >= torch.arange(len(key))
        heads = [t.permute(1, 2, 0, 3) for t in (query, key, value)]
        out = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=self.scale)
        return out.permute(2, 0, 1, 3).flatten(2)


def my_share(whole: Tensor, group) -> Tensor:
    """This rank's tokens of a sequence, with context parallelism."""
    ranks, rank = group.size(), group.rank()
    chunks = whole.chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def whole_sequence(mine: Tensor, group) -> Tensor:
    """The sequence whose shares the ranks of `group` have."""
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine.contiguous(), group=group)
    halves = [part.chunk(2) for part in parts]
    return torch.cat([first for first, _ in halves] + [last for _, last in reversed(halves)])
