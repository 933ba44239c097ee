"""`apply` on every kind of layer that Megatron sums in, at TP 2, in real models of 0.19.2."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from layers_worker import LENGTH
from releases import environment

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.loops.checks import check_parallel, refuse_pipeline

WORKER = Path(__file__).with_name("layers_worker.py")
ATTENTION, MLP = "self_attention.linear_proj", "mlp.linear_fc2"
SHARED = "mlp.shared_experts.linear_fc2"
DISPATCHERS = ["layer 1 mlp.token_dispatcher", "layer 2 mlp.token_dispatcher"]
# Model: its sync points by layer, what stays native.
MODELS = {
    "hybrid": (
        [(1, "mixer.out_proj"), (2, ATTENTION), (3, "self_attention.out_proj"), (4, MLP)]
        + [(5, SHARED)],
        ["layer 5 mlp.token_dispatcher"],
    ),
    "hybrid_mtp": (
        [(1, ATTENTION), (2, MLP)],
        [f"mtp.layers.0.mtp_model_layer.layers.{n}" for n in (f"0.{ATTENTION}", f"1.{MLP}")],
    ),
    "mtp": (
        [(n, name) for n in (1, 2) for name in (ATTENTION, MLP)],
        [f"mtp.layers.{n}.mtp_model_layer.{name}" for n in (0, 1) for name in (ATTENTION, MLP)],
    ),
    "mla": ([(n, name) for n in (1, 2) for name in (ATTENTION, MLP)], []),
    "mla_moe": ([(n, name) for n in (1, 2) for name in (ATTENTION, SHARED)], DISPATCHERS),
    "tied": ([(n, name) for n in (1, 2) for name in (ATTENTION, MLP)], []),
    "tied_sp": ([(n, name) for n in (1, 2) for name in (ATTENTION, MLP)], []),
    "overlap": ([(n, name) for n in (1, 2) for name in (ATTENTION, SHARED)], DISPATCHERS),
    "overlap_sp": ([(n, name) for n in (1, 2) for name in (ATTENTION, SHARED)], DISPATCHERS),
}
EXPERTS = [("allgather", False), ("allgather", True), ("alltoall", False), ("alltoall", True)]
EXPERTS += [("allgather", "ep")]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict]]:
    """By the number of ranks, what each of them saw."""
    out = tmp_path_factory.mktemp("layers")
    env = {**environment("0.19.2"), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(WORKER), str(out)]
    with (out / "log").open("w+") as log:  # no pipe, which a process left behind would keep open
        done = subprocess.run(command, env=env, stdout=log, stderr=log, timeout=300, check=False)
    assert done.returncode == 0, (out / "log").read_text()[-4000:]
    return {
        ranks: [torch.load(out / f"{ranks}_rank{n}.pt", weights_only=False) for n in range(ranks)]
        for ranks in (1, 2, 4)
    }


@pytest.mark.parametrize("model", MODELS)
def test_sync_points_and_what_stays_native(results, model):
    """Every symbol of a hybrid pattern is a layer; heads and routed experts have their reasons."""
    points, native = MODELS[model]
    for rank in results[2]:
        result = rank[model]
        assert sorted(result["points"]) == sorted(points)
        assert {(n, name) for n, names in result["index"].items() for name in names} == set(points)
        assert sorted(result["native"]) == sorted(native)
        assert all(reason for reason in result["native"].values())
        assert f"{len(points)} sync points use rotated-hybrid" in result["text"]
        assert f"{len(native)} stay native" in result["text"]
        for point in result["stats"]["sync_points"]:
            assert [choice["calls"] for choice in point["choices"]] == [1], point


@pytest.mark.parametrize("model", MODELS)
def test_sums_are_those_of_the_codec(results, model):
    """`bf16` gives the fp32 sums' bits, 4 bits lose as they should, and ranks agree."""
    first = results[2][0][model]
    for rank in results[2]:
        result = rank[model]
        assert result["restored"]
        assert sqnr(result["exact"], result["bf16"]["logits"]) > 60
        # Up to 41 dB where errors are carried over five layers.
        assert 8 < sqnr(result["exact"], result["rotated-hybrid"]["logits"]) < 45
        for codec in ("bf16", "rotated-hybrid"):
            assert torch.equal(result[codec]["logits"], first[codec]["logits"])


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_layer_carries_errors(results, model):
    """The worker holds each sum against the specification; numbers say the same as structure."""
    points, _ = MODELS[model]
    for rank in results[2]:
        assert rank[model]["feedback"] == ["carried"] * len(points)
        assert rank[model]["chain"] == {f"layer {n} {name}": "" for n, name in points}


@pytest.mark.parametrize("model", [name for name in MODELS if not name.endswith("_sp")])
def test_nothing_else_leaves_megatrons_own_sum(results, model):
    """Of the all-reduces by the name that layers import, low bits take the sync points' alone."""
    points, native = MODELS[model]
    overlapped = 2 if model == "overlap" else 0  # summed elsewhere in Megatron, too
    for rank in results[2]:
        native_calls = len(rank[model]["native_run"]["layers"])
        assert native_calls - len(rank[model]["bf16"]["layers"]) == len(points) - overlapped
        heads = [name for name in native if name.startswith("mtp.")]
        embeddings = len(rank[model]["bf16"]["layers"]) - len(heads)
        assert embeddings == len(rank[model]["bf16"]["embedded"])


@pytest.mark.parametrize("model", MODELS)
def test_embeddings_stay_bit_identical(results, model):
    """Tied or not, summed by an all-reduce or, with sequence parallelism, a reduce-scatter."""
    for rank in results[2]:
        native = rank[model]["native_run"]["embedded"]
        assert native
        for codec in ("bf16", "rotated-hybrid"):
            low = rank[model][codec]["embedded"]
            assert all(torch.equal(a, b) for a, b in zip(native, low, strict=True))


@pytest.mark.parametrize("case", EXPERTS)
def test_routed_experts_in_low_bits(results, case):
    for rank in results[2]:
        result, first = rank["experts", *case], results[2][0]["experts", *case]
        native = result["native_run"]["logits"]
        assert result["restored"]
        assert len(result["counts"]) == 2, "codec bf16 summed once a layer"
        assert sqnr(native, result["bf16"]["logits"]) > 60
        assert 25 < sqnr(native, result["low"]["logits"]) < 50
        assert torch.equal(result["low"]["logits"], first["low"]["logits"])
        assert result["native"] == {}
        assert "; 2 token dispatchers in rotated-hybrid (6 bits); " in result["text"]
        assert result["text"].endswith("; 0 stay native")
        for layer, one in enumerate(result["stats"]["experts"], start=1):
            assert (one["layer"], one["name"]) == (layer, "mlp.token_dispatcher")
            (choice,) = one["choices"]
            assert choice["collective"] == "reduce-scatter"
            assert choice["calls"] == 1
            assert choice["sent_bytes"] == choice["payload_bytes"] / 2
            assert one["bits_per_value"] < 6.5


@pytest.mark.parametrize("case", [case for case in EXPERTS if case[1]])
def test_token_counts_and_auxiliary_losses_stay_native(results, case):
    """Bit-identical where the router sees the same tokens: in the first layer; exact in all."""
    for rank in results[2]:
        native, low = (rank["experts", *case][run] for run in ("native_run", "low"))
        assert torch.equal(native["counts"][0], low["counts"][0])
        assert torch.equal(native["losses"][0], low["losses"][0])
        assert len(low["counts"]) == len(low["losses"]) == 2
        for counts in low["counts"]:
            assert counts.dtype == torch.int64
            assert counts.sum() == 2 * LENGTH, "two experts for each token"


@pytest.mark.parametrize("case", [case for case in EXPERTS if case[1]])
def test_gradients_through_sums_of_experts(results, case):
    for rank in results[2]:
        result = rank["experts", *case]
        assert sqnr(result["native_gradients"], result["gradients"]) > 25


def test_experts_that_split_their_tokens_unevenly(results):
    """alltoall with expert tensor parallelism 2 and expert parallelism 2."""
    for rank in results[4]:
        result = rank["experts"]
        assert result["restored"]
        assert any(a != b for a, b in result["counts"]), result["counts"]
        native = result["native_run"]["logits"]
        assert sqnr(native, result["bf16"]["logits"]) > 60
        assert 25 < sqnr(native, result["low"]["logits"]) < 50
        assert sqnr(result["native_gradients"], result["gradients"]) > 25


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("no_sync_point", "the model has no sync point that could use low bits: {'layer 1 mlp.tok"),
        ("bits", "codec rotated-hybrid has no 9-bit version"),
        ("dense", "--lowbit-experts has nothing to sum"),
        ("fold", "layer 1 mlp.shared_experts.linear_fc2 is a RowParallelLinear whose partials go"),
        ("flex", "layer 1 mlp.token_dispatcher is a MoEFlexTokenDispatcher, which sums inside"),
        ("pattern", "--hybrid-layer-pattern M+D: layers +, D need --transformer-impl"),
    ],
)
def test_what_cannot_be_done_is_refused_on_every_rank(results, case, text):
    for rank in results[2]:
        assert text in rank["refusals"][case]


@pytest.mark.parametrize(
    ("tensor", "expert_tensor", "experts", "most"),
    [(2, None, 1, None), (2, 1, 2, None), (2, None, 2, 1), (4, 2, 4, 2)],
)
def test_other_tools_refuse_experts_over_data_parallel_ranks(tensor, expert_tensor, experts, most):
    """Those run texts of their own, and would wait for each other for ever."""
    args = _parallel(8, tensor, expert_tensor, experts)
    check_parallel(args)
    if most is None:
        refuse_pipeline(args)
        return
    with pytest.raises(LowbitError, match=f"expert-model-parallel-size {experts} .*pass {most}$"):
        refuse_pipeline(args)


@pytest.mark.parametrize(
    ("ranks", "tensor", "expert_tensor", "experts"), [(6, 2, 1, 3), (8, 2, None, 3)]
)
def test_experts_are_spread_over_whole_groups(ranks, tensor, expert_tensor, experts):
    with pytest.raises(LowbitError, match=f"^--expert-model-parallel-size {experts} spreads"):
        check_parallel(_parallel(ranks, tensor, expert_tensor, experts))


def _parallel(ranks: int, tensor: int, expert_tensor: int | None, experts: int) -> Namespace:
    args = Namespace(pipeline_model_parallel_size=1, context_parallel_size=1, world_size=ranks)
    args.tensor_model_parallel_size, args.expert_tensor_parallel_size = tensor, expert_tensor
    args.expert_model_parallel_size = experts
    return args


def test_experts_that_are_whole_on_their_ranks_are_not_summed(results):
    for rank in results[2]:
        assert rank["whole_experts"] == []


def test_fused_shared_experts_are_listed(results):
    native = results[2][0]["refusals"]["fused"]
    assert native["layer 1 mlp.shared_experts.linear_fc2"] == (
        "fused shared experts, which sum inside themselves"
    )


def test_context_parallelism(results):
    """CP 2 x TP 2: each rank sends its own tokens, over its tensor-parallel group alone."""
    for rank in results[4]:
        whole, split = rank["cp"]["whole"], rank["cp"]["split"]
        assert sqnr(whole["native"], split["native"]) > 40
        assert sqnr(whole["low"], split["low"]) > 40
        assert 8 < sqnr(whole["native"], whole["low"]) < 40
        assert "one-shot over 2 ranks" in split["text"]
        for one, half in zip(
            whole["stats"]["sync_points"], split["stats"]["sync_points"], strict=True
        ):
            assert one["choices"][0]["tokens"] == LENGTH == 2 * half["choices"][0]["tokens"]


def test_interleaved_pipeline(results):
    """PP 2 x TP 2 with two chunks a stage: layers are numbered over all stages."""
    for number, rank in enumerate(results[4]):
        stage = number // 2
        whole, split = rank["pp"]["whole"], rank["pp"]["split"]
        layers = [1 + stage, 3 + stage]
        assert split["points"] == [(n, name) for n in layers for name in (ATTENTION, MLP)]
        assert torch.equal(split["native"], whole["native"])
        assert torch.equal(split["low"], whole["low"])
        assert 8 < sqnr(whole["native"], whole["low"]) < 40
        assert split["restored"]


def test_a_hybrid_models_checkpoint_in_the_tools(results):
    """Saved and loaded under the names that Transformer Engine's layers have, and calibrated."""
    (result,) = results[1]
    assert result["loaded"]
    points = {1: [ATTENTION], 2: [MLP], 3: [ATTENTION], 4: [SHARED]}
    assert result["points"] == points
    assert set(result["recipe"]) == {(n, name) for n, (name,) in points.items()}
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in result["keys"]
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in result["keys"]
    assert "decoder.layers.3.pre_mlp_layernorm.weight" in result["keys"]
