"""`apply` in a real GPTModel of megatron-core, in the ranks of TP 3 and of TP 1.

All of it on two releases; test_matrix.py has the essence on each.
"""

import json

import pytest
import torch
from on_ranks import directory_of_all
from releases import NEWEST
from small_gpt import (
    HIDDEN,
    LAYERS,
    LENGTH,
    MOE,
    POINTS,
    assert_alike,
    build,
    fp32_accumulation,
    low,
    make_index,
    message,
    native_calls,
    start_megatron,
    whole_logits,
)

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.codecs import get_codec

pytestmark = pytest.mark.on_ranks(3)
CODECS = [("bf16", None), ("static-hybrid", None), ("rotated-hybrid", None), ("rotated-hybrid", 2)]


@pytest.fixture(scope="module", params=["0.16.1", NEWEST])
def release(request):
    start_megatron(request.param)
    return request.param


@pytest.fixture(scope="module")
def model(release):
    return build(torch.bfloat16)


@pytest.fixture(scope="module")
def index(model):
    return make_index(model, directory_of_all("index"))[0]


@pytest.fixture(scope="module")
def native(model):
    return whole_logits(model)


@pytest.fixture(scope="module")
def exact(model):
    """Partials summed in fp32."""
    return fp32_accumulation(model)


def run(model, index, codec, bits=None, collective="one-shot", **wishes) -> torch.Tensor:
    with low(model, index, codec=codec, bits=bits, collective=collective, **wishes):
        return whole_logits(model)


@pytest.mark.parametrize(("codec", "bits"), CODECS)
def test_two_runs_on_all_ranks_give_the_same_bits(model, index, codec, bits):
    with low(model, index, codec=codec, bits=bits):
        first = whole_logits(model)
        assert first.isfinite().all()
        assert torch.equal(whole_logits(model), first)
    assert_alike(first)


def test_bf16_codec_equals_megatron_with_fp32_accumulation(model, index, native, exact):
    """Partials are BF16 already, so only the order of the fp32 sum of three could differ: rarely
    more than fp32 rounding before the result is BF16 again. Equal when measured. Gloo sums BF16 in
    BF16; two layers of it differ from fp32 sums by less than 1 %: 43.6 dB when measured.
    """
    got = run(model, index, "bf16")
    assert sqnr(exact, got) > 60
    assert sqnr(native, got) > 40


def test_low_bits_change_the_logits_as_much_as_they_should(model, index, native):
    """Enough to see that payloads travel, and in the codecs' order of quality."""
    static, four, two = (sqnr(native, run(model, index, *codec)) for codec in CODECS[1:])
    assert 40 > four > static > two > 8


def test_collectives_in_the_model(model, index, native):
    """All ranks alike; a sum in 6 bits costs less than one in 4; native is Megatron's own."""

    def quality(codec: str, *bits: int) -> float:
        logits = run(model, index, codec, bits, "two-shot")
        assert_alike(logits)
        return sqnr(native, logits)

    assert 8 < quality("rotated-hybrid", 4, 4) < quality("rotated-hybrid", 4, 6) < 40
    assert quality("static-hybrid", 4, 6) > 5
    assert torch.equal(run(model, index, "rotated-hybrid", None, "native"), native)


@pytest.mark.parametrize("collective", ["two-shot", "native", "auto"])
def test_statistics_by_sync_point_and_collective(model, index, collective):
    with low(model, index, codec="rotated-hybrid", collective=collective) as handle:
        whole_logits(model)
        stats, text = handle.stats(), str(handle)
        retuned = message(handle.retune)
        ways = {point.collective for point in handle.status()}
    json.dumps(stats)
    assert [(point["layer"], point["name"]) for point in stats["sync_points"]] == POINTS
    for point in stats["sync_points"]:
        (choice,) = point["choices"]
        assert (choice["calls"], choice["values"]) == (1, LENGTH * HIDDEN)
        assert choice["seconds"] > 0
        assert choice["sent_bytes"] > 0
        if collective == "auto":
            assert choice["why"].endswith("by times of this group")
        else:
            assert (choice["collective"], choice["why"]) == (collective, "fixed")
    assert sum(choice["calls"] for choice in stats["total"]) == len(POINTS)
    assert f"{collective} over 3 ranks" in text
    if collective == "auto":
        assert "auto over 3 ranks (by times of this group, " in text
        row = torch.bfloat16.itemsize * HIDDEN  # of a token
        (way,) = ways
        assert retuned == "no error"
        assert way.startswith(f"auto by times of this group, {row} B to "), way
    else:
        assert retuned.startswith(f"{collective} is fixed")
    if collective == "two-shot":
        assert "over 3 ranks; errors carried between 4 sync points, 0.8 KB a token" in text
        assert text.endswith("; 0 stay native")


def test_sequence_parallel(release):
    """Reduce-scatter from one quantization; the all-gather before column-parallel linears."""
    model = build(torch.bfloat16, sequence_parallel=True)
    index, _ = make_index(model, directory_of_all("sequence parallel"))
    native = whole_logits(model)
    assert sqnr(fp32_accumulation(model), run(model, index, "bf16", None, "two-shot")) > 60
    got = {}
    for gather in (None, 6):
        wishes = {"collective": "two-shot", "all_gather_bits": gather}
        with low(model, index, codec="rotated-hybrid", **wishes) as handle:
            got[gather], stats = whole_logits(model), handle.stats()
        assert_alike(got[gather])
        assert 8 < sqnr(native, got[gather]) < 40
    assert not torch.equal(got[None], got[6])
    assert len(stats["all_gathers"]) == 2 * LAYERS
    assert [choice["collective"] for choice in stats["total"]] == ["reduce-scatter", "all-gather"]
    assert all(choice["calls"] == 2 * LAYERS for choice in stats["total"])
    assert stats["all_gathers"][0]["bits_per_value"] < 6.5
    assert torch.equal(whole_logits(model), native)
    switched_off(model, index, native)


def switched_off(model, index, native) -> None:
    """Sync points all-reduce then and nothing is gathered, in a handle that knew otherwise."""
    with low(model, index, all_gather_bits=6) as handle:
        for module in model.modules():  # as inference engines do for the steps of decoding
            if getattr(module, "sequence_parallel", False) is True:
                module.sequence_parallel = False
        embedding = model.embedding
        embedding.scatter_to_sequence_parallel = embedding.reduce_scatter_embeddings = False
        embedding.word_embeddings.reduce_scatter_embeddings = False
        model.config.sequence_parallel = False
        logits = whole_logits(model)
        assert [choice["collective"] for choice in handle.stats()["total"]] == ["one-shot"]
    assert_alike(logits)
    assert 8 < sqnr(native, logits) < 40


def test_only_sync_points_are_replaced_and_given_back(model, index, native):
    """Natively the function is called at 2 sync points a layer and in the embedding."""
    assert native_calls(model) == len(POINTS) + 1
    before = {key: value for key, value in model.state_dict().items() if value is not None}
    for codec, bits in CODECS:
        with low(model, index, codec=codec, bits=bits) as handle:
            assert native_calls(model) == 1, "the embedding stays native"
        handle.remove()  # a second time
        after = {key: value for key, value in model.state_dict().items() if value is not None}
        assert list(after) == list(before)
        assert all(torch.equal(value, before[key]) for key, value in after.items())
        assert torch.equal(whole_logits(model), native)


@pytest.mark.parametrize("kind", [{"bias": True}, MOE], ids=["bias", "moe"])
def test_other_models(release, kind):
    """Biases are added once, after the sum; shared experts are sync points as dense MLPs are;
    routed ones stay native and are listed.
    """
    model = build(torch.bfloat16, **kind)
    index, _ = make_index(model, directory_of_all(f"model {kind}"))
    native, exact = whole_logits(model), fp32_accumulation(model)
    with low(model, index, codec="bf16"):
        logits = whole_logits(model)
        assert sqnr(exact, logits) > 60
        assert_alike(logits)
    with low(model, index, codec="rotated-hybrid") as handle:
        logits = whole_logits(model)
        assert 8 < sqnr(exact, logits) < 40
        assert_alike(logits)
        if kind is MOE:
            names = ["self_attention.linear_proj", "mlp.shared_experts.linear_fc2"]
            points = sorted((point.layer, point.name) for point in handle.status())
            assert points == sorted((n, name) for n in (1, 2) for name in names)
            assert sorted(handle.native) == [f"layer {n} mlp.token_dispatcher" for n in (1, 2)]
            text = "2 stay native (2: routed experts, summed by the token dispatcher"
            assert text in str(handle)
    assert torch.equal(whole_logits(model), native)


@pytest.mark.parametrize(("codec", "bits"), CODECS)
def test_status_and_traffic(model, index, codec, bits):
    with low(model, index, codec=codec, bits=bits) as handle:
        whole_logits(model)
        status, text = handle.status(), str(handle)
    assert [(point.layer, point.name) for point in status] == POINTS
    assert f"4 sync points use {codec}" in text
    for point in status:
        assert str(point.codec) == str(get_codec(codec, bits=bits))
        assert point.symmetric_memory == "off: tensors are on cpu"
        assert (point.traffic.calls, point.traffic.values) == (1, LENGTH * HIDDEN)
        assert point.traffic.sent_bytes == 2 * point.traffic.payload_bytes > 0


def test_gradients_flow_as_in_megatron(model, index):
    """The backward pass is the identity: gradients differ only by what the forward pass lost."""
    tokens, mask = torch.arange(LENGTH)[None], torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(tokens, tokens, mask).float().square().mean().backward()
        return model.decoder.layers[0].mlp.linear_fc1.weight.grad.clone()

    expected = gradient()
    for codec, closeness in (("bf16", 35), ("rotated-hybrid", 15)):
        with low(model, index, codec=codec):
            assert sqnr(expected, gradient()) > closeness


def test_rules_give_sync_points_codecs_of_their_own(model, index, tmp_path):
    rules = tmp_path / "rules.json"
    rules.write_text(
        '[{"match": "1.mlp.*", "codec": "native"}, {"match": "1.*", "bits": [3, 6]},'
        ' {"match": "2.mlp.*", "codec": "shaped-hybrid", "bits": 6, "bf16_features": 3}]'
    )
    with low(model, index, recipe=rules, collective="two-shot") as handle:
        text = str(handle)
        assert_alike(whole_logits(model))
        assert list(handle.native) == ["layer 1 mlp.linear_fc2"]
        assert [(p.layer, p.name, repr(p.codec), p.bf16_features) for p in handle.status()] == [
            (1, "self_attention.linear_proj", "rotated-hybrid (3+6 bits)", 2),
            (2, "self_attention.linear_proj", "rotated-hybrid (4 bits)", 2),
            (2, "mlp.linear_fc2", "shaped-hybrid (6 bits)", 3),
        ]
        assert {point.traffic.calls for point in handle.status()} == {1}
    assert "3 sync points use rotated-hybrid, shaped-hybrid, 2-3 of 96 features in BF16" in text
    assert "bits a value on average" in text
    assert "(one codec and rules.json), two-shot over 3 ranks; errors carried between 3" in text
    assert text.endswith("; 1 stay native (1: left native by rules.json)")


@pytest.mark.parametrize(("collective", "loss"), [("one-shot", 3), ("two-shot", 6)])
def test_folded_weights_give_the_same_within_the_codecs_noise(
    model, index, exact, collective, loss
):
    """A random model's logits scatter by a decibel or two from codec to codec."""
    plain = run(model, index, "rotated-hybrid", feedback=False)  # folded weights carry no errors
    with low(model, index, collective=collective, fold=True) as handle:
        logits = whole_logits(model)
        text = f"{collective} over 3 ranks, rotations folded into the weights"
        assert text in str(handle)
        for point in handle.stats()["sync_points"]:
            assert point["choices"][0]["values"] == LENGTH * HIDDEN
    assert_alike(logits)
    assert sqnr(exact, logits) > sqnr(exact, plain) - loss


def test_a_folded_weight_is_saved_and_given_back_as_it_was(model, index, native):
    from megatron.core import parallel_state

    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    linear = model.decoder.layers[0].mlp.linear_fc2
    weight, before = linear.weight, linear.weight.detach().clone()
    with low(model, index, fold=True) as handle:
        assert len(weight) == HIDDEN + 2
        assert linear.weight is weight
        saved = model.state_dict()["decoder.layers.0.mlp.linear_fc2.weight"]
        sharded = linear.sharded_state_dict(prefix="x.", metadata=groups)["x.weight"].data
        assert torch.equal(saved, before)
        assert torch.equal(sharded, before)
        said = message(lambda: model.load_state_dict(model.state_dict()))
        assert said.startswith("the weight of layer 1 ")
        assert said.endswith("is folded: remove() the low-bit handle before loading")
    handle.remove()
    assert torch.equal(weight, before)
    assert torch.equal(whole_logits(model), native)
    loaded = str(model.load_state_dict(model.state_dict()))
    assert loaded == "<All keys matched successfully>"


@pytest.mark.on_ranks(1)
def test_one_rank_sends_nothing_and_loses_nothing():
    start_megatron(NEWEST)
    model = build(torch.bfloat16)
    index, _ = make_index(model, directory_of_all("one rank"))
    native = whole_logits(model)
    for codec, bits in CODECS:
        with low(model, index, codec=codec, bits=bits) as handle:
            assert torch.equal(whole_logits(model), native)
            assert "one rank: nothing is sent" in str(handle)
            assert all(point.traffic.sent_bytes == 0 for point in handle.status())
    fold = message(lambda: run(model, index, "rotated-hybrid", fold=True))
    assert fold.startswith("--lowbit-fold with one rank")
