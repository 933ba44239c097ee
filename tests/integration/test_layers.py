"""`apply` on every kind of layer that Megatron sums in, at TP 2 of the newest release."""

from functools import partial

import kernel_stand_ins
import pytest
import torch
from chain_oracle import assert_follows_chain
from layer_models import (
    ATTENTION,
    DENSE,
    MLP,
    MOE,
    OVERLAP,
    SHARED_EXPERTS,
    CausalAttention,
    gpt,
    hybrid,
)
from on_ranks import directory_of_all
from releases import NEWEST
from small_gpt import (
    assert_alike,
    fp32_accumulation,
    low,
    make_index,
    message,
    native_calls,
    start_megatron,
    whole_logits,
)

import megatron_lowbit
from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.integration.runtime.hybrid import local_stack_spec
from megatron_lowbit.integration.sums.folded_weights import check_foldable
from megatron_lowbit.integration.sums.sync_points import find_sync_points

pytestmark = pytest.mark.on_ranks(2)
CODECS = ["bf16", "rotated-hybrid"]
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
        DENSE,
        [f"mtp.layers.{n}.mtp_model_layer.{name}" for n in (0, 1) for name in (ATTENTION, MLP)],
    ),
    "mla": (partial(gpt, **MLA), DENSE, []),
    "mla_moe": (partial(gpt, **MLA, **MOE), SPARSE, DISPATCHERS),
    "tied": (TIED, DENSE, []),
    "tied_sp": (partial(TIED, sequence_parallel=True), DENSE, []),
    "overlap": (partial(gpt, **OVERLAP), SPARSE, DISPATCHERS),
    "overlap_sp": (partial(gpt, **OVERLAP, sequence_parallel=True), SPARSE, DISPATCHERS),
}


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    start_megatron(NEWEST)
    kernel_stand_ins.install()


@pytest.fixture(scope="module", params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def points(name) -> list[tuple[int, str]]:
    return MODELS[name][1]


@pytest.fixture(scope="module")
def native(name) -> list[str]:
    return MODELS[name][2]


@pytest.fixture(scope="module")
def model(name):
    return MODELS[name][0]()


@pytest.fixture(scope="module")
def index(model, name):
    return make_index(model, directory_of_all(name))[0]


def test_sync_points_and_what_stays_native(model, index, points, native):
    """Every symbol of a hybrid pattern is a layer; heads and routed experts have their reasons."""
    with low(model, index, codec="rotated-hybrid") as handle:
        whole_logits(model)
        assert sorted((point.layer, point.name) for point in handle.status()) == sorted(points)
        assert sorted(handle.native) == sorted(native)
        assert all(handle.native.values())
        assert f"{len(points)} sync points use rotated-hybrid" in str(handle)
        assert f"{len(native)} stay native" in str(handle)
        for point in handle.stats()["sync_points"]:
            assert [choice["calls"] for choice in point["choices"]] == [1], point
    assert {(n, name) for n, names in index.layers.items() for name in names} == set(points)


def test_sums_are_those_of_the_codec(model, index):
    """`bf16` gives the fp32 sums' bits, 4 bits lose as they should, and ranks agree."""
    native, exact, got = whole_logits(model), fp32_accumulation(model), {}
    for codec in CODECS:
        with low(model, index, codec=codec):
            got[codec] = whole_logits(model)
        assert_alike(got[codec])
    assert sqnr(exact, got["bf16"]) > 60
    # Up to 41 dB where errors are carried over five layers.
    assert 8 < sqnr(exact, got["rotated-hybrid"]) < 45
    assert torch.equal(whole_logits(model), native)


def test_every_kind_of_layer_carries_errors(model, index, points):
    """Each sum is the specification's; numbers say the same as structure."""
    for codec in CODECS:
        with low(model, index, codec=codec) as handle:
            assert_follows_chain(model, handle, codec)
            carried = [point.feedback for point in handle.status()]
    assert carried == ["carried"] * len(points)
    assert index.manifest["chain"] == {f"layer {n} {name}": "" for n, name in points}


def all_reduces_and_embeddings(model) -> tuple[int, list[torch.Tensor]]:
    """Of one pass: calls by the name that layers import, and what the embedding gave."""
    embedded: list[torch.Tensor] = []
    hook = model.embedding.register_forward_hook(
        lambda module, inputs, output: embedded.append(output.detach().clone())
    )
    calls = native_calls(model)
    hook.remove()
    return calls, embedded


def test_nothing_else_leaves_megatrons_own_sum(model, index, points, native):
    """Embeddings stay bit-identical: tied or not, summed by an all-reduce or, with sequence
    parallelism, a reduce-scatter. Of the all-reduces low bits take the sync points' alone.
    """
    all_calls, expected = all_reduces_and_embeddings(model)
    assert expected
    config = model.config
    for codec in CODECS:
        with low(model, index, codec=codec):
            calls, embedded = all_reduces_and_embeddings(model)
        assert all(map(torch.equal, expected, embedded))
        assert len(embedded) == len(expected)
        if not config.sequence_parallel:
            overlapped = 2 if config.moe_shared_expert_overlap else 0  # summed elsewhere, too
            assert all_calls - calls == len(points) - overlapped
            assert calls == len(embedded) + sum(name.startswith("mtp.") for name in native)


def test_routed_experts_alone_leave_nothing_for_low_bits():
    routed = {**MOE, "moe_shared_expert_intermediate_size": None}
    said = message(lambda: megatron_lowbit.apply(hybrid("E", **routed), "no index"))
    assert said.startswith(
        "the model has no sync point that could use low bits: {'layer 1 mlp.token_dispatcher"
    )


def test_overlapped_shared_experts_cannot_be_folded():
    points, _ = find_sync_points(gpt(**OVERLAP))
    said = message(lambda: check_foldable([], points))
    assert f"layer 1 {SHARED_EXPERTS} is a RowParallelLinear whose partials go" in said


def test_fused_shared_experts_are_listed():
    model = gpt(**MOE)
    experts = model.decoder.layers[0].mlp.shared_experts
    experts.config.use_grouped_gemm_for_shared_expert = True
    why = find_sync_points(model)[1][f"layer 1 {SHARED_EXPERTS}"]
    assert why == "fused shared experts, which sum inside themselves"


def test_layers_that_need_transformer_engine_are_refused():
    said = message(lambda: local_stack_spec(gpt().config, "M+D"))
    assert "--hybrid-layer-pattern M+D: layers +, D need --transformer-impl" in said
