"""Models of the newest release with each kind of layer that it sums in, split in each way."""

from functools import partial

import torch
from small_gpt import LENGTH, VOCAB, as_trained, build, gathered, seed_all, transformer_config
from torch import Tensor, nn

gpt = partial(build, torch.bfloat16)


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
    halves = [part.chunk(2) for part in gathered(mine, group)]
    return torch.cat([first for first, _ in halves] + [last for _, last in reversed(halves)])
