"""`apply` in a real GPTModel of each supported megatron-core release, at TP 3 and TP 1."""

import json
from pathlib import Path

import pytest
import torch
from core_worker import CODECS, COLLECTIVES, HIDDEN, LAYERS, LENGTH
from forks import forked
from releases import NEWEST
from releases import environment as environment_of

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.calibration.calibration_loop import Progress
from megatron_lowbit.calibration.costs.stored import COSTS, MISSED, SUM_COSTS
from megatron_lowbit.codecs import get_codec

WORKER = Path(__file__).with_name("core_worker.py")
POINTS = [
    (layer, name)
    for layer in range(1, LAYERS + 1)
    for name in ("self_attention.linear_proj", "mlp.linear_fc2")
]


def _run(release: str, ranks: int, out: Path) -> list[dict]:
    done = forked(ranks, WORKER, out, env=environment_of(release))
    assert done.returncode == 0, done.stderr[-4000:]
    results = [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]
    assert results[0]["version"].startswith(release)
    return results


# All of it on two releases; test_matrix.py has the essence on each.
@pytest.fixture(scope="module", params=["0.16.1", NEWEST])
def ranks(request, tmp_path_factory):
    """What each of 3 ranks saw."""
    return _run(request.param, 3, tmp_path_factory.mktemp("core"))


def test_all_ranks_have_bit_identical_logits(ranks):
    for codec in CODECS:
        first = ranks[0]["codecs"][codec]["logits"]
        assert first.isfinite().all()
        for rank in ranks[1:]:
            assert torch.equal(rank["codecs"][codec]["logits"], first), codec


def test_two_runs_give_the_same_bits(ranks):
    for codec in CODECS:
        result = ranks[0]["codecs"][codec]
        assert torch.equal(result["logits"], result["again"]), codec


def test_bf16_codec_equals_megatron_with_fp32_accumulation(ranks):
    """Partials are BF16 already, so only the order of the fp32 sum of three could differ: rarely
    more than fp32 rounding before the result is BF16 again. Equal when measured; BF16 sums of the
    next test are 43.6 dB away.
    """
    expected = ranks[0]["fp32_accumulation"]
    assert sqnr(expected, ranks[0]["codecs"]["bf16", None]["logits"]) > 60


def test_bf16_codec_is_close_to_plain_megatron(ranks):
    """Gloo sums BF16 in BF16; two layers of it differ from fp32 sums by less than 1 %."""
    native, got = ranks[0]["codecs"]["native"], ranks[0]["codecs"]["bf16", None]["logits"]
    assert sqnr(native, got) > 40  # measured 43.6 dB


def test_low_bits_change_the_logits_as_much_as_they_should(ranks):
    """Enough to see that payloads travel, and in the codecs' order of quality."""
    native = ranks[0]["codecs"]["native"]
    quality = {codec: sqnr(native, ranks[0]["codecs"][codec]["logits"]) for codec in CODECS}
    assert quality["rotated-hybrid", None] > quality["static-hybrid", None], quality
    assert quality["static-hybrid", None] > quality["rotated-hybrid", 2], quality
    assert quality["rotated-hybrid", 2] > 8, quality
    assert quality["rotated-hybrid", None] < 40, quality


def test_collectives_in_the_model(ranks):
    """All ranks alike; a sum in 6 bits costs less than one in 4; native is Megatron's own."""
    native = ranks[0]["codecs"]["native"]
    quality = {}
    for case in COLLECTIVES:
        for rank in ranks:
            assert torch.equal(
                rank["collectives"][case]["logits"], ranks[0]["collectives"][case]["logits"]
            ), case
        quality[case] = sqnr(native, ranks[0]["collectives"][case]["logits"])
    coarse, fine = quality["rotated-hybrid", (4, 4), "two-shot"], COLLECTIVES[2]
    assert 8 < coarse < quality[fine] < 40, quality
    assert quality[COLLECTIVES[0]] > 5, quality
    got = ranks[0]["collectives"]["rotated-hybrid", (4, 4), "native"]["logits"]
    assert torch.equal(got, native)


def test_statistics_by_sync_point_and_collective(ranks):
    for rank in ranks:
        for _, bits, mode in COLLECTIVES:
            stats = rank["collectives"]["rotated-hybrid", (4, 4), mode]["stats"]
            if bits != (4, 4):
                stats = rank["collectives"]["rotated-hybrid", bits, mode]["stats"]
            json.dumps(stats)
            assert [(p["layer"], p["name"]) for p in stats["sync_points"]] == POINTS
            for point in stats["sync_points"]:
                (choice,) = point["choices"]
                assert choice["calls"] == 1
                assert choice["values"] == LENGTH * HIDDEN
                assert choice["seconds"] > 0
                assert choice["sent_bytes"] > 0
                if mode == "auto":
                    assert choice["why"].endswith("by times of this group")
                else:
                    assert (choice["collective"], choice["why"]) == (mode, "fixed")
            assert sum(choice["calls"] for choice in stats["total"]) == len(POINTS)
    text = ranks[0]["collectives"]["rotated-hybrid", (4, 6), "two-shot"]["text"]
    assert "two-shot over 3 ranks; errors carried between 4 sync points, 0.8 KB a token" in text
    assert text.endswith("; 0 stay native")
    auto = ranks[0]["collectives"]["rotated-hybrid", (4, 4), "auto"]["text"]
    assert "auto over 3 ranks (by times of this group, " in auto
    row = torch.bfloat16.itemsize * HIDDEN  # of a token
    for name, bits, mode in COLLECTIVES:
        retuned = {rank["collectives"][name, bits, mode]["retuned"].split(":")[0] for rank in ranks}
        (said,) = retuned  # on all ranks alike
        if mode == "auto":
            assert said.startswith(f"auto by times of this group, {row} B to "), said
        else:
            assert said == f"{mode} is fixed"


def test_sequence_parallel(ranks):
    """Reduce-scatter from one quantization; the all-gather before column-parallel linears."""
    for rank in ranks:
        result = rank["sequence_parallel"]
        first = ranks[0]["sequence_parallel"]
        assert result["restored"]
        for case in (("bf16", None), ("rotated-hybrid", None), ("rotated-hybrid", 6)):
            assert torch.equal(result[case], first[case])
        assert sqnr(first["exact"], first["bf16", None]) > 60
        assert 8 < sqnr(first["native"], first["rotated-hybrid", None]) < 40
        assert 8 < sqnr(first["native"], first["rotated-hybrid", 6]) < 40
        assert not torch.equal(first["rotated-hybrid", None], first["rotated-hybrid", 6])
        stats = result["stats", "rotated-hybrid", 6]
        assert len(stats["all_gathers"]) == 2 * LAYERS
        assert [c["collective"] for c in stats["total"]] == ["reduce-scatter", "all-gather"]
        assert all(choice["calls"] == 2 * LAYERS for choice in stats["total"])
        assert stats["all_gathers"][0]["bits_per_value"] < 6.5


def test_sequence_parallelism_that_is_switched_off_between_calls(ranks):
    """Then sync points all-reduce and nothing is gathered."""
    for rank in ranks:
        result = rank["sequence_parallel"]
        assert torch.equal(result["switched"], ranks[0]["sequence_parallel"]["switched"])
        assert 8 < sqnr(result["native"], result["switched"]) < 40
        assert [c["collective"] for c in result["switched_stats"]["total"]] == ["one-shot"]


def test_only_sync_points_are_replaced(ranks):
    """Natively the function is called at 2 sync points a layer and in the embedding."""
    for rank in ranks:
        assert rank["codecs"]["native_calls"] == len(POINTS) + 1
        for codec in CODECS:
            assert rank["codecs"][codec]["calls"] == 1, "the embedding stays native"


def test_remove_restores_logits_and_state_dict(ranks):
    for rank in ranks:
        assert all(rank["codecs"][codec]["restored"] for codec in CODECS)
        assert torch.equal(rank["after_errors"], rank["codecs"]["native"])


@pytest.mark.parametrize("kind", ["bias", "moe"])
def test_other_models(ranks, kind):
    """Biases are added once, after the sum; shared experts are sync points as dense MLPs are."""
    for rank in ranks:
        result = rank[kind]
        assert result["restored"]
        assert torch.equal(result["bf16"], ranks[0][kind]["bf16"])
        assert torch.equal(result["rotated-hybrid"], ranks[0][kind]["rotated-hybrid"])
        assert sqnr(result["exact"], result["bf16"]) > 60
        assert 8 < sqnr(result["exact"], result["rotated-hybrid"]) < 40


def test_routed_experts_stay_native_and_are_listed(ranks):
    result = ranks[0]["moe"]
    names = ["self_attention.linear_proj", "mlp.shared_experts.linear_fc2"]
    assert sorted(result["points"]) == sorted((n, name) for n in (1, 2) for name in names)
    assert sorted(result["native"]) == [f"layer {n} mlp.token_dispatcher" for n in (1, 2)]
    assert "2 stay native (2: routed experts, summed by the token dispatcher" in result["text"]


def test_status_and_traffic(ranks):
    for name, bits in CODECS:
        result = ranks[0]["codecs"][name, bits]
        assert [(layer, point) for layer, point, _, _ in result["status"]] == POINTS
        assert {codec for _, _, codec, _ in result["status"]} == {str(get_codec(name, bits=bits))}
        assert f"4 sync points use {name}" in result["text"]
        assert result["symmetric_memory"] == {"off: tensors are on cpu"}
        for traffic in result["traffic"]:
            assert traffic.calls == 3
            assert traffic.values == 3 * LENGTH * HIDDEN
            assert traffic.sent_bytes == 2 * traffic.payload_bytes > 0


def test_gradients_flow_as_in_megatron(ranks):
    """The backward pass is the identity: gradients differ only by what the forward pass lost."""
    gradients = ranks[0]["gradients"]
    assert sqnr(gradients[None], gradients["bf16"]) > 35
    assert sqnr(gradients[None], gradients["rotated-hybrid"]) > 15


def test_calibrated_index(ranks):
    for rank in ranks:
        assert rank["progress"] == Progress(done=5)
        assert sorted(rank["index"]) == sorted(POINTS)
        record = rank["index"][1, "mlp.linear_fc2"]
        assert record.minimum.shape == (3, HIDDEN)
        assert (record.minimum < record.mean).all()
        assert (record.mean < record.maximum).all()
        assert not torch.equal(record.minimum[0], record.minimum[1]), "ranks have partials apart"
    assert ranks[0]["manifest"]["model"]["num_layers"] == LAYERS


def test_nan_in_calibration_is_reported_with_its_layer(ranks):
    for rank in ranks:
        assert "sequence 0: not finite at layer 2 mlp.linear_fc2" in rank["not_finite"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("none", "no calibration index at .*megatron_lowbit calibrate"),
        ("codec", "unknown codec 'mp3'"),
        ("bits", "no 7-bit version"),
        ("tp", "calibrated at tensor parallel size 2, this run has 3"),
        ("tp_rotated", "no error"),
        ("disagree", "rank 0 has .*3 bits.*, rank 1 has .*2 bits"),
        ("one_rank", "no calibration index .*found by rank 0"),
        ("num_layers", "another model: its num_layers is 7, this model's is 2"),
        ("hidden_size", "another model: its hidden_size is 7, this model's is 96"),
        ("ffn_hidden_size", "another model: its ffn_hidden_size is 7"),
        ("gather", "--lowbit-all-gather has nothing to gather"),
        ("mode", "unknown collective 'ring'"),
        ("modes", "ranks differ in their collective"),
        ("sum_bits", "ranks differ in their codec.*4\\+6 bits"),
        ("rotations", "ranks differ in .*_ROTATION: rank 0 .*butterflies, rank 1 .*tensor-cores"),
        ("rotation", "MEGATRON_LOWBIT_ROTATION=wings: choose butterflies.*found by rank 1"),
        ("tuning", "cannot read .*none.json: .*make it with"),
        ("rule", r"'9\.\*' matches no sync point .* layers 1 to 2"),
        ("all_native", "leaves no sync point in low bits"),
        ("rules_differ", r"ranks differ in their codec.*\(2 bits\)"),
        ("skip_bias_add", "layer 1 mlp.linear_fc2 adds its bias itself"),
        ("twice", "layer 1 self_attention.linear_proj is already attached"),
        ("te", "layer 1 mlp.linear_fc2 is a TERowParallelLinear"),
        ("not_megatron", "Linear has no Megatron-core transformer layer"),
    ],
)
def test_what_cannot_be_done_is_refused_on_every_rank(ranks, case, message):
    import re

    for rank in ranks:
        assert re.search(message, rank["errors"][case]), rank["errors"][case]


def test_rules_give_sync_points_codecs_of_their_own(ranks):
    for rank in ranks:
        result = rank["rules"]
        assert result["status"] == [
            (1, "self_attention.linear_proj", "rotated-hybrid (3+6 bits)", 2, 1),
            (2, "self_attention.linear_proj", "rotated-hybrid (4 bits)", 2, 1),
            (2, "mlp.linear_fc2", "shaped-hybrid (6 bits)", 3, 1),
        ]
        assert list(result["native"]) == ["layer 1 mlp.linear_fc2"]
        assert torch.equal(result["logits"], ranks[0]["rules"]["logits"])
    text = ranks[0]["rules"]["text"]
    assert "3 sync points use rotated-hybrid, shaped-hybrid, 2-3 of 96 features in BF16" in text
    assert "bits a value on average" in text
    assert "(one codec and rules0.json), two-shot over 3 ranks; errors carried between 3" in text
    assert text.endswith("; 1 stay native (1: left native by rules0.json)")


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_predicted_divergence_is_what_is_measured(ranks, sequence_parallel):
    """The Fisher information's prediction, on a random model: within a quarter."""
    for bits in (3, 4, 5):
        predicted, measured = ranks[0]["planning"]["divergence", sequence_parallel, bits]
        assert 0.75 < predicted / measured < 1.33, (bits, predicted, measured)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_predicted_divergence_with_feedback_is_of_the_measured_size(ranks, sequence_parallel):
    """Neighbours interact, which the prediction leaves out: 0.55 of it on SmolLM2."""
    for bits in (3, 4, 5):
        _, plain = ranks[0]["planning"]["divergence", sequence_parallel, bits]
        predicted, measured = ranks[0]["planning"]["carried", sequence_parallel, bits]
        assert measured < plain
        assert 0.3 < predicted / measured < 1.5, (bits, predicted, measured, plain)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_plan_without_gradients_is_nearly_as_good_and_alike_on_all_ranks(
    ranks, sequence_parallel
):
    found = ranks[0]["planning"]
    for rank in ranks:
        assert rank["planning"]["forward", sequence_parallel] == found["forward", sequence_parallel]
    by_gradients = found["plan by", "gradients", sequence_parallel]
    assert found["plan by", "divergence", sequence_parallel] < 2 * by_gradients


def test_a_target_is_met_with_the_fewest_bits(ranks):
    target, recipe, nats = ranks[0]["planning"]["target"]
    assert 0.6 * target < nats <= target
    for rank in ranks:
        assert rank["planning"]["target"] == (target, recipe, nats), "agreed to the last bit"


def test_folded_weights_give_the_same_within_the_codecs_noise(ranks):
    exact = ranks[0]["fp32_accumulation"]
    codec = sqnr(exact, ranks[0]["folding"]["plain"])
    for rank in ranks:
        result = rank["folding"]
        assert torch.equal(result["one-shot"], ranks[0]["folding"]["one-shot"])
        # A random model's logits scatter by a decibel or two from codec to codec.
        assert sqnr(exact, result["one-shot"]) > codec - 3
        assert sqnr(exact, result["two-shot"]) > codec - 6
        assert "two-shot over 3 ranks, rotations folded into the weights" in result["text"]
        for point in result["stats"]["sync_points"]:
            assert point["choices"][0]["values"] == LENGTH * HIDDEN


def test_a_folded_weight_is_saved_and_given_back_as_it_was(ranks):
    for rank in ranks:
        result = rank["folding"]
        assert result["rows"] == HIDDEN + 2
        assert result["same_parameter"]
        assert result["saved"]
        assert result["restored"]
        assert result["load"].startswith("the weight of layer 1 ")
        assert result["load"].endswith("is folded: remove() the low-bit handle before loading")
        assert result["loads"] == "<All keys matched successfully>"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("auto", "--lowbit-fold cannot work with --lowbit-collective auto"),
        ("static", "--lowbit-fold: static-hybrid has no rotation to fold"),
        ("shared", "weight of layer 1 mlp.linear_fc2 is shared with another module"),
        ("quantized", "weight of layer 1 mlp.linear_fc2 is quantized"),
    ],
)
def test_weights_that_cannot_be_folded_are_refused(ranks, case, message):
    for rank in ranks:
        assert message in rank["folding"][case]


def test_a_module_that_megatron_muted_stays_native(ranks):
    assert ranks[0]["errors"]["muted"] == "no error"
    reasons = ranks[0]["errors"]["muted_list"]
    assert reasons == {
        "layer 1 mlp.linear_fc2": "already muted by Megatron, which sums it elsewhere"
    }


def _counted(traffic) -> tuple:
    return traffic.tokens, traffic.values, traffic.payload_bytes, traffic.sent_bytes


def test_simulated_ranks_give_the_bits_of_real_ones(ranks):
    """In one process, from the whole model: the contract of `--simulate-tp`.

    It needs a matrix product whose bits do not depend on its number of columns, which holds for
    BF16 on CPUs with AVX512-BF16.
    """
    for rank in ranks:
        got = rank["simulated"]
        for name, bits in CODECS:
            real, one = ranks[0]["codecs"][name, bits], got[name, bits, "one-shot"]
            assert torch.equal(one["logits"], real["logits"]), (name, bits)
            for mine, theirs in zip(one["traffic"], real["traffic"], strict=True):
                assert _counted(theirs) == tuple(3 * count for count in _counted(mine))
        for case in COLLECTIVES[:3]:
            real, one = ranks[0]["collectives"][case], got[case]
            assert torch.equal(one["logits"], real["logits"]), case
            for mine, point in zip(one["traffic"], real["stats"]["sync_points"], strict=True):
                (choice,) = point["choices"]
                assert _counted(mine) == tuple(
                    choice[key] for key in ("tokens", "values", "payload_bytes", "sent_bytes")
                )


def test_simulated_native_is_codec_bf16(ranks):
    for rank in ranks:
        got = rank["simulated"]
        assert torch.equal(got["native"], got["bf16", None, "one-shot"]["logits"])
        assert torch.equal(got["after"], got["native"])


def test_simulated_calibration_finds_what_real_ranks_find(ranks):
    """Bit for bit at the first sync point; behind it native sums differ by BF16's rounding."""
    real, index = ranks[0]["index"], ranks[0]["simulated"]["index"]
    assert index.tp_size == 3
    chain = {f"layer {layer} {name}": "" for layer, name in POINTS}
    assert index.manifest["chain"] == chain
    first = POINTS[0]
    for layer, name in POINTS:
        for field, value in vars(index.record(layer, name)).items():
            expected = getattr(real[layer, name], field)
            if field in (*COSTS, *SUM_COSTS, MISSED):  # of a recipe, which one of both has
                continue
            if (layer, name) == first and not field.startswith("sum_"):
                assert torch.equal(value, expected), field
            elif field != "bf16_index":
                assert sqnr(expected, value) > 25, (layer, name, field)
    for rank in ranks:
        for point in POINTS:
            mine, theirs = rank["simulated"]["index"].record(*point), index.record(*point)
            assert torch.equal(mine.maximum, theirs.maximum), "the same on data-parallel ranks"


def test_simulation_needs_ranks_that_divide(ranks):
    message = ranks[0]["simulated"]["divide"]
    assert message == (
        "--simulate-tp 5 does not divide the 96 inputs of layer 1 self_attention.linear_proj: "
        "choose a divisor"
    )


def test_index_of_other_weights_is_refused(ranks):
    assert all("other weights (layer 1 differs)" in rank["other_weights"] for rank in ranks)


def test_one_rank_sends_nothing_and_loses_nothing(tmp_path):
    result = _run("0.19.2", 1, tmp_path)[0]
    native = result["codecs"]["native"]
    for codec in CODECS:
        assert torch.equal(result["codecs"][codec]["logits"], native)
        assert "one rank: nothing is sent" in result["codecs"][codec]["text"]
        assert all(traffic.sent_bytes == 0 for traffic in result["codecs"][codec]["traffic"])
    assert result["folding"]["one_rank"].startswith("--lowbit-fold with one rank")
