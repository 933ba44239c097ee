"""`apply` on every kind of layer that Megatron sums in, at TP 2 of the newest release."""

from functools import partial
from types import SimpleNamespace

import kernel_stand_ins
import pytest
import torch
from chain_oracle import CODECS, check_codecs
from layer_models import CausalAttention, gpt, hybrid, my_share, whole_sequence
from releases import NEWEST
from small_gpt import (
    ATTENTION,
    LENGTH,
    MLP,
    MOE,
    OVERLAP,
    POINTS,
    SHARED_EXPERTS,
    TOKENS,
    index_of,
    low,
    message,
    native_calls,
    start_megatron,
    whole_logits,
    whole_vocabulary,
)

import megatron_lowbit
from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.integration.runtime.hybrid import local_stack_spec
from megatron_lowbit.integration.sums.folded_weights import check_foldable
from megatron_lowbit.integration.sums.sync_points import find_sync_points

pytestmark = pytest.mark.on_ranks(2)
SPARSE = [(layer, name) for layer in (1, 2) for name in (ATTENTION, SHARED_EXPERTS)]
DISPATCHERS = ["layer 1 mlp.token_dispatcher", "layer 2 mlp.token_dispatcher"]
MLA = {
    "attention": CausalAttention,
    "multi_latent_attention": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
    "rope_type": "rope",
}
TIED = partial(gpt, place={"share_embeddings_and_output_weights": True})
# Name: how it is built, its sync points by layer, what stays native.
MODELS = {
    "hybrid": (
        partial(hybrid, "M*G-E", **MOE),
        [(1, "mixer.out_proj"), (2, ATTENTION), (3, "self_attention.out_proj"), (4, MLP)]
        + [(5, SHARED_EXPERTS)],
        ["layer 5 mlp.token_dispatcher"],
    ),
    "hybrid_mtp": (
        partial(hybrid, "*-/*-", mtp_num_layers=1),
        [(1, ATTENTION), (2, MLP)],
        [f"mtp.layers.0.mtp_model_layer.layers.{n}" for n in (f"0.{ATTENTION}", f"1.{MLP}")],
    ),
    "mtp": (
        partial(gpt, mtp_num_layers=2),
        POINTS,
        [f"mtp.layers.{n}.mtp_model_layer.{name}" for n in (0, 1) for name in (ATTENTION, MLP)],
    ),
    "mla": (partial(gpt, **MLA), POINTS, []),
    "mla_moe": (partial(gpt, **MLA, **MOE), SPARSE, DISPATCHERS),
    "bias": (partial(gpt, bias=True), POINTS, []),
    "tied": (TIED, POINTS, []),
    "tied_sp": (partial(TIED, sequence_parallel=True), POINTS, []),
    "overlap": (partial(gpt, **OVERLAP), SPARSE, DISPATCHERS),
    "overlap_sp": (partial(gpt, **OVERLAP, sequence_parallel=True), SPARSE, DISPATCHERS),
}


@pytest.fixture(scope="module", params=MODELS)
def case(release, request) -> SimpleNamespace:
    kernel_stand_ins.install()
    build, points, native = MODELS[request.param]
    model = build()
    return SimpleNamespace(model=model, index=index_of(model), points=points, native=native)


def test_sync_points_and_what_stays_native(case):
    """Every symbol of a hybrid pattern is a layer; heads and routed experts have their reasons."""
    with low(case.model, case.index, codec="rotated-hybrid") as handle:
        whole_logits(case.model)
        assert sorted(handle.native) == sorted(case.native)
        assert all(handle.native.values())
        assert f"{len(case.points)} sync points use rotated-hybrid" in str(handle)
        assert f"{len(case.native)} stay native" in str(handle)
        for point in handle.stats()["sync_points"]:
            assert [choice["calls"] for choice in point["choices"]] == [1], point
    found = {(n, name) for n, names in case.index.layers.items() for name in names}
    assert found == set(case.points)


def test_sums_are_those_of_the_codec_and_carry_errors(case):
    """In every kind of layer. Up to 41 dB where errors are carried over five layers."""
    check_codecs(case.model, case.index, case.points, most=45)


def all_reduces_and_embeddings(model) -> tuple[int, list[torch.Tensor]]:
    """Of one pass: calls by the name that layers import, and what the embedding gave."""
    embedded: list[torch.Tensor] = []
    with model.embedding.register_forward_hook(
        lambda module, inputs, output: embedded.append(output.detach().clone())
    ):
        return native_calls(model), embedded


def test_nothing_else_leaves_megatrons_own_sum(case):
    """Embeddings stay bit-identical: tied or not, summed by an all-reduce or, with sequence
    parallelism, a reduce-scatter. Of the all-reduces low bits take the sync points' alone.
    """
    all_calls, expected = all_reduces_and_embeddings(case.model)
    assert expected
    config = case.model.config
    for codec in CODECS:
        with low(case.model, case.index, codec=codec):
            calls, embedded = all_reduces_and_embeddings(case.model)
        assert all(map(torch.equal, expected, embedded))
        assert len(embedded) == len(expected)
        if not config.sequence_parallel:
            overlapped = 2 if config.moe_shared_expert_overlap else 0  # summed elsewhere, too
            assert all_calls - calls == len(case.points) - overlapped
            assert calls == len(embedded) + sum(name.startswith("mtp.") for name in case.native)


def test_routed_experts_alone_leave_nothing_for_low_bits(release):
    routed = {**MOE, "moe_shared_expert_intermediate_size": None}
    said = message(lambda: megatron_lowbit.apply(hybrid("E", **routed), "no index"))
    assert said.startswith(
        "the model has no sync point that could use low bits: {'layer 1 mlp.token_dispatcher"
    )


def test_overlapped_shared_experts_cannot_be_folded(release):
    points, _ = find_sync_points(gpt(**OVERLAP))
    said = message(lambda: check_foldable([], points))
    assert f"layer 1 {SHARED_EXPERTS} is a RowParallelLinear whose partials go" in said


def test_fused_shared_experts_are_listed(release):
    model = gpt(**MOE)
    experts = model.decoder.layers[0].mlp.shared_experts
    experts.config.use_grouped_gemm_for_shared_expert = True
    why = find_sync_points(model)[1][f"layer 1 {SHARED_EXPERTS}"]
    assert why == "fused shared experts, which sum inside themselves"


def test_layers_that_need_transformer_engine_are_refused(release):
    said = message(lambda: local_stack_spec(gpt().config, "M+D"))
    assert "--hybrid-layer-pattern M+D: layers +, D need --transformer-impl" in said


@torch.inference_mode()
def over_contexts(model) -> torch.Tensor:
    """Logits of the whole sequence."""
    from megatron.core import parallel_state

    group = parallel_state.get_context_parallel_group()
    tokens, places = my_share(TOKENS[0], group), my_share(torch.arange(LENGTH), group)
    return whole_sequence(whole_vocabulary(model(tokens[None], places[None], None)[0]), group)


@pytest.mark.on_ranks(4)
def test_with_context_parallelism_each_rank_sends_its_own_tokens():
    """Over its tensor-parallel group alone."""

    def sent() -> tuple[torch.Tensor, torch.Tensor, list[int], str]:
        model = gpt(attention=CausalAttention)
        native = over_contexts(model)
        with low(model, index) as handle:
            got = over_contexts(model)
            points = handle.stats()["sync_points"]
            return native, got, [p["choices"][0]["tokens"] for p in points], str(handle)

    start_megatron(NEWEST, 2)
    index = index_of(gpt(attention=CausalAttention))
    native, got, tokens, _ = sent()
    start_megatron(NEWEST, 2, context_parallel_size=2)
    native_split, got_split, tokens_split, text = sent()
    assert sqnr(native, native_split) > 40
    assert sqnr(got, got_split) > 40
    assert 8 < sqnr(native, got) < 40
    assert "one-shot over 2 ranks" in text
    assert tokens == [LENGTH] * 4
    assert tokens_split == [LENGTH / 2] * 4
