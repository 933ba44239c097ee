"""Checks of `apply` on every kind of layer that Megatron sums in; run by test_layers.py.

One process imports Megatron (8 s) and forks the ranks: first two of tensor parallel size 2, then
four. Each writes what it saw to OUT/<ranks>_rank<n>.pt; the assertions are in test_layers.py.
"""

import faulthandler
import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import kernel_stand_ins
import torch
import torch.distributed as dist
from chain_oracle import follows_chain, recorded
from small_gpt import message
from torch import Tensor, nn

from megatron_lowbit.codecs import get_codec
from megatron_lowbit.integration.cpu.device import enable_cpu

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
OVERLAP = {
    **SHARED,
    "moe_token_dispatcher_type": "alltoall",
    "moe_shared_expert_overlap": True,
}
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
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    chunks = whole.chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def whole_sequence(mine: Tensor, group) -> Tensor:
    """The sequence whose shares the ranks of `group` have."""
    ranks = dist.get_world_size(group)
    parts = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(parts, mine.contiguous(), group=group)
    halves = [part.chunk(2) for part in parts]
    return torch.cat([first for first, _ in halves] + [last for _, last in reversed(halves)])


def gpt_model(
    dtype: torch.dtype = torch.bfloat16,
    *,
    mtp: bool = False,
    attention: type | None = None,
    model: dict | None = None,
    **config,
):
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
    if attention is not None:
        spec.submodules.self_attention.submodules.core_attention = attention
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

    from megatron_lowbit.integration.runtime.hybrid import local_final_norm, local_stack_spec

    made = transformer_config(
        dtype,
        num_layers=len(pattern.split("/")[0]),
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
            local_stack_spec(made, pattern),
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


def tokens() -> Tensor:
    return torch.arange(LENGTH) * 7 % VOCAB


def whole_logits(model: nn.Module) -> Tensor:
    """Logits of the whole vocabulary for fixed tokens."""
    from megatron_lowbit.model.forward import logits

    return whole_vocabulary(logits(model, tokens()[None])[0])


def whole_vocabulary(mine: Tensor) -> Tensor:
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def make_index(model: nn.Module, out: Path):
    """Calibrate on random tokens, by the same function as tools/calibrate.py."""
    from megatron_lowbit.integration.loops.calibrate_checkpoint import calibrate_model

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
    from megatron_lowbit.integration.sums.sync_points import Attachment, find_sync_points

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
    """What Megatron's own sums and the embedding gave, and losses, while it is in place."""

    def __init__(self, model: nn.Module):
        from megatron.core.tensor_parallel import layers
        from megatron.core.transformer.moe import moe_utils

        self.found: dict[str, list[Tensor]] = {"layers": [], "counts": [], "losses": []}
        self.found["embedded"] = []
        self._undo: list[Callable] = []
        for kind, module in (("layers", layers), ("counts", moe_utils)):
            self._watch(kind, module, "reduce_from_tensor_model_parallel_region")
        for module in model.modules():
            if hasattr(module, "attach_and_log_load_balancing_loss"):
                self._watch_loss(module)
        keep = self.found["embedded"].append
        hook = model.embedding.register_forward_hook(lambda m, i, out: keep(out.detach().clone()))
        self._undo.append(hook.remove)

    def _watch(self, kind: str, module, name: str) -> None:
        original = getattr(module, name)

        def watching(*args, **kwargs):
            total = original(*args, **kwargs)
            self.found[kind].append(total.detach().clone())
            return total

        setattr(module, name, watching)
        self._undo.append(lambda: setattr(module, name, original))

    def _watch_loss(self, router) -> None:
        original = router.attach_and_log_load_balancing_loss

        def watching(activation, aux_loss_coeff, aux_loss, *args, **kwargs):
            self.found["losses"].append(aux_loss.detach().clone())
            return original(activation, aux_loss_coeff, aux_loss, *args, **kwargs)

        router.attach_and_log_load_balancing_loss = watching
        self._undo.append(lambda: delattr(router, "attach_and_log_load_balancing_loss"))

    def close(self) -> dict:
        for undo in self._undo:
            undo()
        return self.found


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
        with recorded() as calls:
            result[codec] = seen(model)
        result["feedback"] = [status.feedback for status in handle.status()]
        follows_chain(calls, [found == "carried" for found in result["feedback"]], out.name)
        result["points"] = [(status.layer, status.name) for status in handle.status()]
        result["native"], result["text"], result["stats"] = (
            handle.native,
            str(handle),
            handle.stats(),
        )
        handle.remove()
    result["restored"] = torch.equal(whole_logits(model), result["native_run"]["logits"])
    result["index"] = {n: sorted(points) for n, points in index.layers.items()}
    result["chain"] = index.manifest["chain"]
    return result


def parallel(**sizes) -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)


def trained(model: nn.Module) -> Tensor:
    """Logits in training, where a router has counts and losses; leaves gradients behind."""
    from megatron.core import parallel_state

    from megatron_lowbit.model.forward import forward

    # Megatron's buffer for all-gathers: one made in inference mode cannot be written outside it.
    parallel_state.get_global_memory_buffer().buffer.clear()
    model.train().zero_grad()
    mine = forward(model, tokens()[None])
    generator = torch.Generator().manual_seed(3 + dist.get_rank())
    (mine.float() * torch.randn(mine.shape, generator=generator)).sum().backward()
    model.eval()
    return whole_vocabulary(mine[0].detach())


def gradients(model: nn.Module) -> Tensor:
    """Of what lies before the first sum of experts' outputs."""
    (layer, _) = model.decoder.layers
    weights = [layer.self_attention.linear_qkv.weight, layer.mlp.router.weight]
    return torch.cat([weight.grad.flatten().float() for weight in weights])


def experts(out: Path, **config) -> dict:
    """Routed experts in low bits, with exact sums elsewhere."""
    import megatron_lowbit
    from megatron_lowbit.integration.sums import experts as ours

    model = gpt_model(**{**SHARED, **config})
    run = trained if config.get("sequence_parallel") else whole_logits
    index = make_index(model, out)
    result = {"native_run": seen(model, run)}
    if run is trained:
        result["native_gradients"] = gradients(model)
    sums = ours.find_expert_sums(model, 4)
    for one in sums:
        one.codec = get_codec("bf16")
        one.tables = one.codec.tables(HIDDEN)
    attachment = ours.ExpertAttachment(sums)
    with watched_counts(ours) as result["counts"]:
        result["bf16"] = seen(model, run)
    attachment.remove()
    handle = megatron_lowbit.apply(
        model, index, codec="bf16", collective="one-shot", experts_bits=6
    )
    result["low"] = seen(model, run)
    if run is trained:
        result["gradients"] = gradients(model)
    result |= {"text": str(handle), "native": handle.native, "stats": handle.stats()}
    handle.remove()
    same = torch.equal(seen(model, run)["logits"], result["native_run"]["logits"])
    methods = {"token_combine", "combine_preprocess"}
    left = [vars(moe.token_dispatcher).keys() & methods for moe in mixtures(model)]
    result["restored"] = same and not any(left)
    return result


@contextmanager
def watched_counts(ours) -> Iterator[list]:
    """The blocks that sums of experts' outputs are split into."""
    found, original = [], ours.reduce_scatter

    def watching(x, **kwargs):
        found.append(kwargs["counts"])
        return original(x, **kwargs)

    ours.reduce_scatter = watching
    yield found
    ours.reduce_scatter = original


def mixtures(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "token_dispatcher")]


def refusals(out: Path) -> dict:
    """Models without sums to take over."""
    import megatron_lowbit
    from megatron_lowbit.integration.runtime.hybrid import local_stack_spec
    from megatron_lowbit.integration.sums.experts import find_expert_sums
    from megatron_lowbit.integration.sums.folded_weights import check_foldable
    from megatron_lowbit.integration.sums.sync_points import find_sync_points

    routed = hybrid_model("E", **MOE)
    moe = gpt_model(**SHARED)
    (first, _) = mixtures(moe)
    found = {
        "no_sync_point": message(lambda: megatron_lowbit.apply(routed, out / "none")),
        "bits": message(lambda: find_expert_sums(moe, 9)),
        "dense": experts_error(gpt_model(), make_index(gpt_model(), out / "dense")),
        "pattern": message(lambda: local_stack_spec(moe.config, "M+D")),
        "fold": message(lambda: check_foldable([], find_sync_points(gpt_model(**OVERLAP))[0])),
    }
    first.shared_experts.config.use_grouped_gemm_for_shared_expert = True
    found["fused"] = find_sync_points(moe)[1]
    first.token_dispatcher.__class__ = type("MoEFlexTokenDispatcher", (), {})
    found["flex"] = message(lambda: find_expert_sums(moe, 4))
    return found


def two_ranks(out: Path) -> dict:
    parallel(tensor_model_parallel_size=2)
    tied = {"share_embeddings_and_output_weights": True}
    mla = {**MLA, "attention": CausalAttention}
    results = {
        "hybrid": exercise(hybrid_model(PATTERN, **SHARED), out / "hybrid"),
        "hybrid_mtp": exercise(hybrid_model("*-/*-", mtp_num_layers=1), out / "hybrid_mtp"),
        "mtp": exercise(gpt_model(mtp=True, mtp_num_layers=2), out / "mtp"),
        "mla": exercise(gpt_model(**mla), out / "mla"),
        "mla_moe": exercise(gpt_model(**mla, **SHARED), out / "mla_moe"),
        "tied": exercise(gpt_model(model=tied), out / "tied"),
        "tied_sp": exercise(gpt_model(model=tied, sequence_parallel=True), out / "tied_sp"),
        "overlap": exercise(gpt_model(**OVERLAP), out / "overlap"),
        "overlap_sp": exercise(gpt_model(**OVERLAP, sequence_parallel=True), out / "overlap_sp"),
        "refusals": refusals(out),
    }
    for kind in ("allgather", "alltoall"):
        for sp in (False, True):
            choice = {"moe_token_dispatcher_type": kind, "sequence_parallel": sp}
            choice["moe_router_dtype"] = None if sp else "fp32"  # Megatron then sums in fp32
            results["experts", kind, sp] = experts(out / f"{kind}{sp}", **choice)
    # Experts on ranks of their own, each whole: alltoall has nothing to sum, allgather does.
    parallel(
        tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1
    )
    choice = {"moe_token_dispatcher_type": "allgather", "sequence_parallel": True}
    results["experts", "allgather", "ep"] = experts(out / "ep", **choice)
    whole = gpt_model(**{**SHARED, "moe_token_dispatcher_type": "alltoall"})
    from megatron_lowbit.integration.sums.experts import find_expert_sums

    results["whole_experts"] = [str(one) for one in find_expert_sums(whole, 4)]
    return results


def experts_error(model: nn.Module, index) -> str:
    import megatron_lowbit

    return message(lambda: megatron_lowbit.apply(model, index, experts_bits=4))


def four_ranks(out: Path) -> dict:
    parallel(tensor_model_parallel_size=2)
    contexts = {"attention": CausalAttention}
    index = make_index(gpt_model(**contexts), out / "cp")
    whole = context(gpt_model(**contexts), index)
    deep = gpt_model(num_layers=4)
    deep_index = make_index(deep, out / "pp")
    weights = {
        name: value.clone() for name, value in deep.state_dict().items() if value is not None
    }
    expected = pipeline([deep], deep_index)
    parallel(
        tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=2
    )
    with uneven_over_gloo():
        uneven = experts(
            out / "uneven", moe_token_dispatcher_type="alltoall", sequence_parallel=True
        )
    parallel(tensor_model_parallel_size=2, context_parallel_size=2)
    results = {"cp": {"whole": whole, "split": context(gpt_model(**contexts), index)}}
    results["experts"] = uneven
    parallel(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
    )
    chunks = interleaved(weights)
    results["pp"] = {"whole": expected, "split": pipeline(chunks, deep_index)}
    return results


@contextmanager
def uneven_over_gloo() -> Iterator[None]:
    """What Megatron's alltoall dispatcher needs for uneven blocks, and a CPU with Gloo has not.

    Megatron turns split sizes on CUDA into numbers, and leaves those on a CPU tensors; Gloo's
    all-gather and reduce-scatter take blocks of one size only.
    """
    from megatron.core.transformer.moe import token_dispatcher

    names = {"all_gather": dist.all_gather, "reduce_scatter": dist.reduce_scatter}
    exchange = token_dispatcher.all_to_all

    def all_to_all(group, x, *splits, **kwargs):
        return exchange(group, x, *(split.tolist() for split in splits), **kwargs)

    def all_gather(outputs, x, group=None):
        if all(out.shape == x.shape for out in outputs):
            return names["all_gather"](outputs, x, group=group)
        most = max(map(len, outputs))
        parts = [out.new_empty(most, *out.shape[1:]) for out in outputs]
        mine = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
        names["all_gather"](parts, mine, group=group)
        for out, part in zip(outputs, parts, strict=True):
            out.copy_(part[: len(out)])

    def reduce_scatter(output, inputs, group=None):
        total = torch.cat(inputs)
        dist.all_reduce(total, group=group)
        output.copy_(total.split([len(part) for part in inputs])[dist.get_rank(group)])

    token_dispatcher.all_to_all = all_to_all
    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter
    yield
    token_dispatcher.all_to_all = exchange
    dist.all_gather, dist.reduce_scatter = names.values()


def context(model: nn.Module, index) -> dict:
    """A model with or without context parallelism."""
    from megatron.core import parallel_state

    import megatron_lowbit

    group = parallel_state.get_context_parallel_group()

    @torch.inference_mode()
    def run() -> Tensor:
        mine, places = (my_share(t, group) for t in (tokens(), torch.arange(LENGTH)))
        return whole_sequence(whole_vocabulary(model(mine[None], places[None], None)[0]), group)

    result = {"native": run()}
    handle = megatron_lowbit.apply(model, index, collective="one-shot")
    result |= {"low": run(), "text": str(handle), "stats": handle.stats()}
    handle.remove()
    return result


def interleaved(weights: dict[str, Tensor]) -> list[nn.Module]:
    """This stage's two chunks of the model that has `weights`: layers 1, 2 | 3, 4 by stage."""
    from megatron.core import parallel_state

    stage, chunks = parallel_state.get_pipeline_model_parallel_rank(), []
    for virtual in (0, 1):
        layer = 2 * virtual + stage  # counted from 0
        chunk = gpt_model(
            num_layers=4,
            virtual_pipeline_model_parallel_size=2,
            model={
                "pre_process": layer == 0,
                "post_process": layer == 3,
                "vp_stage": virtual,
            },
        )
        mine = {
            name: weights[name.replace("decoder.layers.0.", f"decoder.layers.{layer}.")]
            for name, value in chunk.state_dict().items()
            if value is not None
        }
        chunk.load_state_dict(mine, strict=False)
        chunks.append(chunk)
    return chunks


def pipeline(chunks: list[nn.Module], index) -> dict:
    """A model, or this rank's chunks of it, one after the other through all stages."""
    from megatron.core import parallel_state

    import megatron_lowbit

    group = parallel_state.get_pipeline_model_parallel_group()
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    members = dist.get_process_group_ranks(group)
    places = torch.arange(LENGTH)
    mask = (places[:, None] < places)[None, None]

    @torch.inference_mode()
    def run() -> Tensor | None:
        hidden = None
        for step in range(ranks * len(chunks)):
            chunk, owner = chunks[step // ranks], step % ranks
            if owner == rank:
                chunk.set_input_tensor(hidden)
                hidden = chunk(tokens()[None], places[None], mask)
            if ranks > 1:
                hidden = handed_on(hidden, members[owner], group)
        return whole_vocabulary(hidden[0])

    result = {"native": run()}
    # Carried errors end with a chunk: matrix_worker.py shows where.
    handle = megatron_lowbit.apply(chunks, index, collective="one-shot", feedback=False)
    result |= {"low": run(), "text": str(handle)}
    result["points"] = [(status.layer, status.name) for status in handle.status()]
    handle.remove()
    result["restored"] = torch.equal(run(), result["native"])
    return result


def handed_on(hidden: Tensor | None, owner: int, group) -> Tensor:
    shared = [hidden]
    dist.broadcast_object_list(shared, src=owner, group=group)
    return shared[0]


def tools(out: Path) -> dict:
    """A HybridModel's checkpoint through tools/calibrate.py and tools/evaluate.py."""
    from megatron.core import dist_checkpointing

    from megatron_lowbit.integration.runtime import session
    from megatron_lowbit.integration.runtime.checkpoint import TRACKER
    from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args

    flags = (
        "--hybrid-layer-pattern *-*E --hidden-size 48 --num-attention-heads 4 --swiglu --bf16 "
        "--seq-length 64 --max-position-embeddings 64 --position-embedding-type rope "
        "--normalization RMSNorm --disable-bias-linear --num-experts 4 --moe-router-topk 2 "
        "--moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 32 "
        "--moe-token-dispatcher-type allgather --tokenizer-type NullTokenizer --vocab-size 60"
    )
    args = parse_megatron_args(flags.split())
    session.initialize(args)
    model = session.load_model(args)
    where = out / "ckpt" / "release"
    where.mkdir(parents=True)
    (unwrapped,) = (m for m in model.modules() if type(m).__name__ == "HybridModel")
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
    state["model"] = unwrapped.sharded_state_dict()
    keys = sorted({part.key for part in state["model"].values() if hasattr(part, "data")})
    dist_checkpointing.save(state, str(where))
    (out / "ckpt" / TRACKER).write_text("release")
    expected = {name: value for name, value in unwrapped.state_dict().items() if value is not None}
    session.shutdown()
    (out / "numbers.txt").write_text(" ".join(str(n * n % 59) for n in range(400)))
    data = ["--load", str(out / "ckpt"), "--data", str(out / "numbers.txt"), "--simulate-tp", "2"]
    calibrate = [*data, "--sequences", "4", "--seq-length", "16", "--budget", "4"]
    run_tool("calibrate.py", *calibrate)
    from megatron_lowbit.calibration.index_files import read_index

    index = read_index(out / "ckpt" / "lowbit")
    loaded = parse_megatron_args(["--load", str(out / "ckpt")])
    session.initialize(loaded)
    found = session.load_model(loaded).state_dict()
    return {
        "keys": keys,
        "points": {n: sorted(points) for n, points in index.layers.items()},
        "recipe": index.recipe,
        "loaded": all(torch.equal(found[name], value) for name, value in expected.items()),
    }


def run_tool(name: str, *argv: str) -> None:
    """A tool in this process, which has Megatron imported already."""
    path = Path(__file__).resolve().parents[2] / "tools" / name
    sys.argv = [str(path), *argv]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{name} ended with {end.code}") from end


def join(ranks: int, rank: int, out: Path) -> None:
    store = dist.FileStore(str(out / f"store{ranks}"), ranks)
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=patience)


def fork(ranks: int, work: Callable[[Path], dict], out: Path) -> None:
    """Run `work` in `ranks` forked processes of one Gloo group."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(100, exit=True)  # a hung collective says where
            status = 1
            try:
                if ranks > 1:  # tools start a group of one themselves
                    join(ranks, rank, out)
                torch.save(work(out / str(ranks)), out / f"{ranks}_rank{rank}.pt")
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                for process in multiprocessing.active_children():  # of Megatron's checkpointing
                    process.kill()
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
    from megatron_lowbit.integration.runtime.megatron_args import require_megatron_training

    require_megatron_training()
    for ranks, work in ((1, tools), (2, two_ranks), (4, four_ranks)):
        (out / str(ranks)).mkdir()
        fork(ranks, work, out)


if __name__ == "__main__":
    main()
