"""Checks of `apply` on every kind of layer that Megatron sums in; run by test_layers.py.

One process imports Megatron (8 s) and forks the ranks: first two of tensor parallel size 2, then
four. Each writes what it saw to OUT/<ranks>_rank<n>.pt; the assertions are in test_layers.py.
"""

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import kernel_stand_ins
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lowbit.codecs import get_codec
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.cpu import enable_cpu

HIDDEN, HEADS, VOCAB, LENGTH = 96, 6, 120, 24
PATTERN = "M*G-E"
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 96,
    "moe_token_dispatcher_type": "allgather",
    "moe_aux_loss_coeff": 0.01,
}
SHARED = {**MOE, "moe_shared_expert_intermediate_size": 96}
MLA = {
    "multi_latent_attention": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
    "rope_type": "rope",
}


class RMSNorm(nn.RMSNorm):
    """Megatron's torch norms refuse sequence parallelism, which asks nothing of a norm here."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps)


def transformer_config(dtype: torch.dtype, **config):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)
    torch.manual_seed(1)
    kind = MLATransformerConfig if config.get("multi_latent_attention") else TransformerConfig
    fields = {"num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": HEADS}
    return kind(
        **{**fields, **config},
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        normalization="RMSNorm",
        masked_softmax_fusion=False,
        use_mamba_mem_eff_path=False,
    )


def gpt_model(dtype: torch.dtype = torch.bfloat16, *, mtp: bool = False, model=None, **config):
    """A GPTModel of the local spec; `model` has arguments of its own."""
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    made = transformer_config(dtype, **config)
    spec = get_gpt_layer_local_spec(
        made.num_moe_experts,
        multi_latent_attention=made.multi_latent_attention,
        normalization="RMSNorm",
    )
    heads = get_gpt_mtp_block_spec(made, spec, use_transformer_engine=False) if mtp else None
    block = spec
    if made.sequence_parallel:
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        layers = [spec] * made.num_layers
        block = TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
    built = GPTModel(
        made,
        block,
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        mtp_block_spec=heads,
        **(model or {}),
    )
    return _as_trained(built, dtype)


def hybrid_model(pattern: str, dtype: torch.dtype = torch.bfloat16, **config):
    """A HybridModel of the local spec."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_lowbit.integration.hybrid import local_final_norm, local_stack_spec

    made = transformer_config(
        dtype,
        num_layers=len(pattern),
        is_hybrid_model=True,
        mamba_state_dim=16,
        mamba_head_dim=16,
        mamba_num_groups=2,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        **config,
    )
    # Gated delta nets then run Megatron's own torch code; the config itself wants CUDA's settings.
    made.deterministic_mode = True
    with local_final_norm():
        built = HybridModel(
            made,
            local_stack_spec(made),
            vocab_size=VOCAB,
            max_sequence_length=LENGTH,
            hybrid_layer_pattern=pattern,
            position_embedding_type="rope",
        )
    return _as_trained(built, dtype)


def _as_trained(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Norms as a trained model has them, the same on every rank: not all one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                generator = torch.Generator().manual_seed(hash_of(name))
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def hash_of(name: str) -> int:
    return sum(ord(letter) * (place + 1) for place, letter in enumerate(name))


def whole_logits(model: nn.Module) -> Tensor:
    """Logits of the whole vocabulary for fixed tokens."""
    from megatron.core import parallel_state

    from megatron_lowbit.integration.forward import logits

    mine = logits(model, (torch.arange(LENGTH) * 7 % VOCAB)[None])[0].contiguous()
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return torch.cat(parts, dim=1)


def make_index(model: nn.Module, out: Path):
    """Calibrate on random tokens, by the same function as tools/calibrate.py."""
    from megatron_lowbit.integration.calibrate import calibrate_model

    index, _ = calibrate_model(
        model,
        torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0)),
        codec=get_codec("rotated-hybrid"),
        bf16_features=2,
        corpus={"sha256": "0"},
        partial=out / "partial",
    )
    return index


def exact_sums(model: nn.Module) -> Tensor:
    """Logits with Megatron's partials summed in fp32 instead of the model's dtype."""
    from megatron_lowbit.integration.sync_points import Attachment, find_sync_points

    points, _ = find_sync_points(model)

    def summing(group):
        def reduce(partial, scatter):
            total = partial.float()
            dist.all_reduce(total, group=group)
            total = total.to(partial.dtype)
            ranks, rank = dist.get_world_size(group), dist.get_rank(group)
            return total.chunk(ranks)[rank].contiguous() if scatter else total

        return reduce

    attachment = Attachment(points, [summing(point.group) for point in points])
    result = whole_logits(model)
    attachment.remove()
    return result


class Seen:
    """What goes through Megatron's own sums and out of the embedding, while it is in place."""

    def __init__(self, model: nn.Module):
        from megatron.core.tensor_parallel import layers
        from megatron.core.transformer.moe import moe_utils

        self.sums: dict[str, list[Tensor]] = {"layers": [], "counts": []}
        self.embedded: list[Tensor] = []
        self._undo = []
        for kind, module in (("layers", layers), ("counts", moe_utils)):
            self._watch(kind, module, "reduce_from_tensor_model_parallel_region")
        hook = model.embedding.register_forward_hook(lambda m, i, out: self.embedded.append(out))
        self._undo.append(hook.remove)

    def _watch(self, kind: str, module, name: str) -> None:
        original = getattr(module, name)

        def watching(*args, **kwargs):
            total = original(*args, **kwargs)
            self.sums[kind].append(total.clone())
            return total

        setattr(module, name, watching)
        self._undo.append(lambda: setattr(module, name, original))

    def close(self) -> dict:
        for undo in self._undo:
            undo()
        return {**self.sums, "embedded": [t.clone() for t in self.embedded]}


def seen(model: nn.Module, run: Callable[[nn.Module], Tensor] = whole_logits) -> dict:
    watch = Seen(model)
    result = run(model)
    return {"logits": result, **watch.close()}


def exercise(model: nn.Module, out: Path, **options) -> dict:
    """How a model runs natively, in fp32 sums, and with codecs, and what is left afterwards."""
    import megatron_lowbit

    index = make_index(model, out)
    result = {"native_run": seen(model), "exact": exact_sums(model)}
    for codec in ("bf16", "rotated-hybrid"):
        handle = megatron_lowbit.apply(model, index, codec=codec, collective="one-shot", **options)
        result[codec] = seen(model)
        result["points"] = [(status.layer, status.name) for status in handle.status()]
        result["native"], result["text"], result["stats"] = handle.native, str(handle), handle.stats()
        handle.remove()
    result["restored"] = torch.equal(whole_logits(model), result["native_run"]["logits"])
    result["index"] = {n: sorted(points) for n, points in index.layers.items()}
    return result


def parallel(**sizes) -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)


def message(step: Callable) -> str:
    try:
        step()
    except LowbitError as error:
        return str(error)
    return "no error"


def two_ranks(out: Path) -> dict:
    parallel(tensor_model_parallel_size=2)
    results = {
        "hybrid": exercise(hybrid_model(PATTERN, **SHARED), out / "hybrid"),
        "mla": exercise(gpt_model(**MLA), out / "mla"),
    }
    return results


def four_ranks(out: Path) -> dict:
    return {}


def fork(ranks: int, work: Callable[[Path], dict], out: Path) -> None:
    """Run `work` in `ranks` forked processes of one Gloo group."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                store = dist.FileStore(str(out / f"store{ranks}"), ranks)
                patience = timedelta(seconds=60)
                dist.init_process_group(
                    "gloo", store=store, rank=rank, world_size=ranks, timeout=patience
                )
                torch.save(work(out / str(ranks)), out / f"{ranks}_rank{rank}.pt")
                dist.barrier()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    if failed:
        raise SystemExit(1)


def main() -> None:
    out = Path(sys.argv[1])
    enable_cpu()
    torch.set_num_threads(1)
    kernel_stand_ins.install()
    from megatron_lowbit.integration.megatron_args import require_megatron_training

    require_megatron_training()
    for ranks, work in ((2, two_ranks), (4, four_ranks)):
        (out / str(ranks)).mkdir()
        fork(ranks, work, out)


if __name__ == "__main__":
    main()
