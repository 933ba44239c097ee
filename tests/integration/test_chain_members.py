"""What is in a chain of error feedback and what is outside; on each release, in ranks of TP 2."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from chain_models import POINTS, build_chain, chain_of, index_of, reasons, with_chain, without_chain
from chain_oracle import assert_follows_chain
from releases import RELEASES
from small_gpt import (
    HIDDEN,
    MOE,
    OVERLAP,
    low,
    message,
    refusal,
    rules,
    seed_all,
    transformer_config,
)
from torch import nn

from megatron_lowbit.calibration.index_files import read_index, write_index
from megatron_lowbit.integration import assignment
from megatron_lowbit.integration.sums.chain_check import CHANGED, MOVED
from megatron_lowbit.integration.sums.chains import why_apart

pytestmark = [
    pytest.mark.on_ranks(2),
    pytest.mark.support("error feedback"),
    pytest.mark.parametrize("release", RELEASES, indirect=True),
]


@pytest.fixture(scope="module")
def index(release):
    """Of a model as it should be."""
    return index_of(build_chain())


@pytest.fixture
def model(release):
    return build_chain()


def own(function: Callable) -> Callable:
    """A function as a fork has it."""
    function.__module__ = "my_fork.layers"
    return function


def layer_scale(layer: nn.Module) -> None:
    """As in RETRO or a vision model: the sum is scaled before it is added."""
    original = layer.self_attn_bda
    layer.self_attn_bda = own(
        lambda training, fused: (
            lambda out, residual, dropout: original(training, fused)(
                (out[0] * 0.5, out[1]), residual, dropout
            )
        )
    )


def post_norm_child(layer: nn.Module) -> None:
    layer.after_attention = nn.LayerNorm(HIDDEN, dtype=torch.bfloat16)


def own_method(name: str) -> Callable:
    def change(layer: nn.Module) -> None:
        kind = type(layer)
        original = getattr(kind, name)
        method = own(lambda self, *args, **kwargs: original(self, *args, **kwargs))
        layer.__class__ = type("MyLayer", (kind,), {name: method})

    return change


def hook_at(path: str) -> Callable:
    return lambda layer: layer.get_submodule(path).register_forward_hook(own(lambda *_: None))


def replaced_forward(layer: nn.Module) -> None:
    original = layer.mlp.forward
    layer.mlp.forward = own(lambda *args, **kwargs: original(*args, **kwargs))


def config_field(name: str, value: object) -> Callable:
    def change(layer: nn.Module) -> None:
        layer.config = copy.copy(layer.config)
        setattr(layer.config, name, value)

    return change


# What stands between sum and stream in layer 2: attention's reason, the MLP's reason.
STRANGERS: dict[str, tuple[Callable, str, str]] = {
    "layer scale": (layer_scale, "its self_attn_bda is not Megatron's own", ""),
    "post norm": (post_norm_child, "has a child after_att", "has a child after_att"),
    "forward": (own_method("forward"), "MyLayer has a forward", "MyLayer has a forward"),
    "_forward_mlp": (own_method("_forward_mlp"), "MyLayer has a _forw", "MyLayer has a _forw"),
    "hook on the layer": (hook_at(""), "has a forward hook", "has a forward hook"),
    "hook on the MLP": (hook_at("mlp"), "", "its MLP has a forward hook"),
    "hook on the linear": (hook_at("mlp.linear_fc2"), "", "Linear has a forward hook"),
    "hook on attention": (hook_at("self_attention"), "Attention has a forward hook", ""),
    "replaced forward": (replaced_forward, "", "forward of its MLP was replaced"),
    "hyper-connections": (config_field("enable_mhc_connections", True), "hyper", "hyper"),
    "chunks of the MLP": (config_field("mlp_chunks_for_prefill", 2), "", "in chunks of the pro"),
}


@pytest.mark.parametrize(("change", "attention", "mlp"), STRANGERS.values(), ids=STRANGERS)
def test_strangers_neither_give_nor_take(model, index, change, attention, mlp):
    """The carry passes by what stands outside of the chain."""
    change(model.decoder.layers[1])
    with low(model, without_chain(index)) as handle:
        found, text = reasons(handle), str(handle)
        assert found[:2] == found[4:] == ["carried"] * 2
        for said, expected in zip(found[2:4], (attention, mlp), strict=True):
            assert said.startswith("off: ") if expected else said == "carried"
            assert expected in said
        outside = [said.removeprefix("off: ") for said in found if said != "carried"]
        assert f"carried between {POINTS - len(outside)} sync points" in text
        assert all(f": {reason})" in text for reason in outside), text
        assert_follows_chain(model, handle)
        assert handle.feedback()["dropped"] == 0


def test_cross_attention_has_a_bda_of_its_own(release):
    """A decoder's layer of T5 has three sync points, each added to the stream as it is."""
    from megatron.core.models.T5.t5_spec import get_t5_decoder_with_local_block_spec
    from megatron.core.transformer.spec_utils import build_module

    seed_all(1)
    try:
        spec = get_t5_decoder_with_local_block_spec(1).layer_specs[0]
    except NameError:
        pytest.skip("the local T5 of this release needs Transformer Engine")
    layer = build_module(spec, config=transformer_config(torch.bfloat16), layer_number=1)
    names = ["self_attention.linear_proj", "cross_attention.linear_proj", "mlp.linear_fc2"]

    def found() -> list[str]:
        return [why_apart(layer, name) for name in names]

    assert found() == ["", "", ""]
    layer.cross_attn_bda = own(lambda training, fused: None)
    assert found() == ["", "its cross_attn_bda is not Megatron's own", ""]


def test_linears_that_norm_are_refused(model, index):
    """Megatron-Bridge's for Gemma 2 and 3: the norm would be given a partial."""
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    class Normed(RowParallelLinear):
        def forward(self, x):
            out, bias = super().forward(x)
            return nn.functional.layer_norm(out, (HIDDEN,)), bias

    Normed.__module__ = "my_fork.linears"
    model.decoder.layers[1].mlp.linear_fc2.__class__ = Normed
    start = "layer 2 mlp.linear_fc2 has a forward pass of its own, that of Normed"
    assert refusal(model, index).startswith(start)


@pytest.fixture(scope="module")
def experts_index(release):
    return index_of(build_chain(**MOE))


def test_shared_experts_that_are_called_whole_stay_native(experts_index):
    model = build_chain(**OVERLAP)
    model.decoder.layers[1].mlp._inference_token_dispatcher = None  # as NVLS has one: calls whole
    with low(model, experts_index) as handle:
        assert reasons(handle) == ["carried"] * (POINTS - 1)
        whole = handle.native["layer 2 mlp.shared_experts.linear_fc2"]
        assert whole == "shared experts that the inference dispatcher calls whole"


def test_a_shared_expert_behind_a_gate_is_outside(experts_index):
    model = build_chain(**MOE)
    shared = model.decoder.layers[1].mlp.shared_experts
    shared.use_shared_expert_gate = True
    shared.gate_weight = nn.Parameter(torch.randn(1, HIDDEN, dtype=torch.bfloat16))
    with low(model, without_chain(experts_index)) as handle:
        assert reasons(handle)[3] == "off: a gate scales its sum"
        assert reasons(handle).count("carried") == POINTS - 1
        assert_follows_chain(model, handle)


def theirs(function: Callable) -> Callable:
    """A function that passes for Megatron's own: structure does not tell it."""
    function.__module__ = "megatron.core.patched"
    return function


@pytest.fixture
def scaled(release):
    """A model with a layer that scales what its MLP sums, though its structure is Megatron's."""
    model = build_chain(bias=True)
    model.decoder.layers[1].mlp.register_forward_hook(
        theirs(lambda module, inputs, output: (output[0] * 0.5, output[1]))
    )
    return model


def test_calibration_sees_what_a_layer_adds_besides_its_sums(scaled, tmp_path):
    """That takes it out of the chain, wherever the index is read. Biases do not."""
    index = index_of(scaled)
    assert chain_of(index) == ["", "", CHANGED, CHANGED, "", ""]
    write_index(index, tmp_path / "lowbit")
    with low(scaled, read_index(tmp_path / "lowbit")) as handle:
        outside = f"off: {CHANGED}"
        assert reasons(handle) == [*["carried"] * 2, *[outside] * 2, *["carried"] * 2]
        assert f"(2: {CHANGED})" in str(handle)
        assert_follows_chain(scaled, handle)


def test_a_reason_by_structure_comes_first(scaled):
    for layer in scaled.decoder.layers:  # by structure alone: main's block would really mix
        config_field("enable_mhc_connections", True)(layer)
    assert set(chain_of(index_of(scaled))) == {"hyper-connections mix the stream"}


def test_calibration_sees_a_stream_that_changes_between_layers(release):
    """Then nothing is carried, though the index finds the model as it was trained."""
    model = build_chain(bias=True)
    double = theirs(lambda module, inputs, named: (inputs, doubled(named)))
    with model.decoder.layers[1].register_forward_pre_hook(double, with_kwargs=True):
        index = index_of(model)
    assert set(chain_of(index)) == {MOVED}
    with low(model, index) as handle:
        assert f"errors are not carried (6: {MOVED})" in str(handle)
        assert reasons(handle) == [f"off: {MOVED}"] * POINTS


def doubled(named: dict) -> dict:
    return {**named, "hidden_states": named["hidden_states"] * 2}


def test_a_damaged_chain_is_refused(index, tmp_path):
    write_index(with_chain(index, {"layer 1": 3}), tmp_path / "lowbit")
    said = message(lambda: read_index(tmp_path / "lowbit"))
    assert "chain.layer 1: Input should be a valid string" in said


def test_another_chain_than_calibrated_is_refused(model, index):
    """In one line with the first such sync point, unless errors are not carried."""
    asked = (
        ": error feedback needs the model that was calibrated; calibrate this one with "
        "python -m megatron_lowbit calibrate, or do without (--lowbit-no-feedback; no "
        "NAME@feedback in an evaluation)"
    )
    chain = {**index.manifest["chain"], "layer 2 mlp.linear_fc2": "its own norm"}
    assert refusal(model, with_chain(index, chain)) == (
        "layer 2 mlp.linear_fc2 is in the chain here, and outside of it (its own norm) in the "
        "calibration index" + asked
    )
    layer_scale(model.decoder.layers[1])
    assert refusal(model, index) == (
        "layer 2 self_attention.linear_proj is outside the chain here (its self_attn_bda is not "
        "Megatron's own), and in it in the calibration index" + asked
    )
    for without in ({"feedback": False}, {"codec": "static-hybrid"}):
        with low(model, index, **without) as handle:
            assert reasons(handle) == ["off"] * POINTS


def test_ranks_that_differ_in_feedback_are_refused(model, index):
    said = refusal(model, index, feedback=dist.get_rank() == 0)
    start = "ranks differ in their codec, feedback, dtype or calibration index: "
    assert said.startswith(start)
    assert "errors carried" in said
    assert "errors not carried" in said


def test_feedback_with_folded_weights_is_refused(model, index):
    """Which do without it where it is not asked for."""
    with low(model, index, fold=True) as handle:
        assert reasons(handle) == ["off"] * POINTS
    assert "cannot be carried" in refusal(model, index, fold=True, feedback=True)


FOLLOWS = "has 0 bits, and no sync point with bits follows to send its error: give this one"
LOST = "layer 2 mlp.linear_fc2 has 0 bits, which only error feedback makes good: leave"


@pytest.mark.parametrize(
    ("match", "wishes", "text"),
    [
        ("3.mlp.*", {}, f"layer 3 mlp.linear_fc2 {FOLLOWS}"),
        ("2.*", {}, f"layer 2 self_attention.linear_proj {FOLLOWS}"),
        ("*", {}, f"layer 1 self_attention.linear_proj {FOLLOWS}"),
        ("2.mlp.*", {"feedback": False}, LOST),
        ("2.mlp.*", {"fold": True}, LOST),
    ],
    ids=["the last", "a layer", "all", "no feedback", "folded"],
)
def test_0_bits_are_refused_where_nothing_sends_the_sum(model, index, match, wishes, text):
    skip = rules({"match": match, "bits": 0})
    assert refusal(model, index, recipe=skip, **wishes).startswith(text)


def test_0_bits_outside_of_the_chain_are_refused(model, index):
    post_norm_child(model.decoder.layers[1])
    said = refusal(model, without_chain(index), recipe=rules({"match": "2.mlp.*", "bits": 0}))
    start = "layer 2 mlp.linear_fc2 has 0 bits, and its error cannot be carried ("
    assert said.startswith(start)
    assert "has a child" in said


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"codec": "static-hybrid", "bits": 0}, "codec static-hybrid has no 0-bit version"),
        ({"bits": [0, 4]}, "shaped-hybrid cannot have bits 0,4: 0 bits send no message at all"),
        ({"bits": [4, 0]}, "shaped-hybrid cannot have bits 4,0: 0 bits send no message at all"),
        ({"bits": -1}, "-1 is neither 0 to 16 bits nor"),
    ],
    ids=["codec", "0,4", "4,0", "-1"],
)
def test_rules_that_no_codec_can_keep_are_refused(model, index, values, text):
    path = rules({"match": "2.mlp.*", **values})
    said = refusal(model, index, recipe=path)
    assert text in said
    assert f"{path.parents[1]}/rank_" in said  # of the rank that found it


def test_rules_are_read_once(model, index, monkeypatch):
    """A file that changes while it is read twice would give half of each."""
    path = rules({"match": "2.mlp.*", "bits": 3})
    original, read = assignment.read_rules, []
    monkeypatch.setattr(assignment, "read_rules", lambda p: read.append(p) or original(p))
    with low(model, index, recipe=path) as handle:
        assert [status.codec.bits for status in handle.status()] == [4, 4, 4, 3, 4, 6]
    assert read == [path]
