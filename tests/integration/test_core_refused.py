"""What `apply` cannot do in a model is refused, on all ranks of TP 3, and changes nothing."""

import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from small_gpt import build, index_of, low, message, refusal, rules, whole_logits

import megatron_lowbit
from megatron_lowbit.comm.policy.policy import Settings
from megatron_lowbit.integration.sums.sync_points import find_sync_points
from megatron_lowbit.kernels import switches

pytestmark = pytest.mark.on_ranks(3)


@pytest.fixture(autouse=True)
def _unchanged(model, index):
    """A refusal leaves the model as it was."""
    before = whole_logits(model)
    yield
    assert torch.equal(whole_logits(model), before)


def refused(model, index, text: str, **wishes) -> None:
    said = refusal(model, index, **wishes)
    assert re.search(text, said), said


@pytest.mark.parametrize(
    ("wishes", "text"),
    [
        (dict(codec="mp3"), "unknown codec 'mp3'"),
        (dict(bits=7), "no 7-bit version"),
        (dict(all_gather_bits=6), "--lowbit-all-gather has nothing to gather"),
        (dict(collective="ring"), "unknown collective 'ring'"),
        (dict(collective=Settings(tuning="none.json")), "cannot read .*none.json: .*make it with"),
        (
            dict(collective="auto", fold=True),
            "--lowbit-fold cannot work with --lowbit-collective auto",
        ),
        (
            dict(codec="static-hybrid", collective="one-shot", fold=True),
            "--lowbit-fold: static-hybrid has no rotation to fold",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wishes_that_cannot_be_met(model, index, wishes, text):
    refused(model, index, text, **wishes)


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("bits", [3, 2, 2], "rank 0 has .*3 bits.*, rank 1 has .*2 bits"),
        ("bits", [(4, 4), (4, 6), (4, 6)], "ranks differ in their codec.*4\\+6 bits"),
        ("collective", ["native", "one-shot", "one-shot"], "ranks differ in their collective"),
    ],
)
def test_wishes_that_differ_by_rank(model, index, name, values, text):
    refused(model, index, text, **{name: values[dist.get_rank()]})


def test_an_index_that_is_missing_on_one_rank(model, index):
    refused(model, "no-such-index", "no calibration index at .*megatron_lowbit calibrate")
    own = index if dist.get_rank() else "no-such-index"
    refused(model, own, "no calibration index .*found by rank 0")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("num_layers", "another model: its num_layers is 7, this model's is 2"),
        ("hidden_size", "another model: its hidden_size is 7, this model's is 96"),
        ("ffn_hidden_size", "another model: its ffn_hidden_size is 7"),
    ],
)
def test_an_index_of_another_model(model, index, key, text):
    wrong = {**index.manifest["model"], key: 7}
    refused(model, replace(index, manifest={**index.manifest, "model": wrong}), text)


def test_an_index_of_other_weights(index):
    refused(build(torch.bfloat16, seed=2), index, r"other weights \(layer 1 differs\)")


def test_an_index_of_another_tensor_parallel_size(model, index):
    """What is calibrated by rank is refused; rotations go with any size."""
    other = replace(index, manifest={**index.manifest, "tp_size": 2})
    text = "calibrated at tensor parallel size 2, this run has 3"
    refused(model, other, text, codec="static-hybrid")
    megatron_lowbit.apply(model, other, codec="rotated-hybrid").remove()


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (lambda _: {"match": "9.*", "bits": 3}, r"'9\.\*' matches no sync point .* layers 1 to 2"),
        (lambda _: {"match": "*", "codec": "native"}, "leaves no sync point in low bits"),
        (
            lambda rank: {"match": "1.mlp.*", "bits": 2 + rank % 2},
            r"ranks differ in their codec.*\(2 bits\)",
        ),
    ],
    ids=["no match", "all native", "differ by rank"],
)
def test_rules(model, index, rule, text):
    refused(model, index, text, recipe=rules(rule(dist.get_rank())))


def test_ways_to_rotate(model, index, monkeypatch):
    with switches.rotating_by(switches.ROTATIONS[dist.get_rank() % 2]):
        differ = "ranks differ in .*_ROTATION: rank 0 .*butterflies, rank 1 .*tensor-cores"
        refused(model, index, differ)
    if dist.get_rank() == 1:
        monkeypatch.setenv(switches.ROTATION_SWITCH, "wings")
    with switches.rotating_by(None):
        unknown = "MEGATRON_LOWBIT_ROTATION=wings: choose butterflies.*found by rank 1"
        refused(model, index, unknown)


def test_a_model_that_has_low_bits_already(model, index):
    with low(model, index):
        refused(model, index, "layer 1 self_attention.linear_proj is already attached")


def test_modules_that_are_no_sync_points(model, index, monkeypatch):
    module = find_sync_points(model)[0][1].module
    with monkeypatch.context() as patch:
        patch.setattr(module, "skip_bias_add", False)
        refused(model, index, "layer 1 mlp.linear_fc2 adds its bias itself")
    with monkeypatch.context() as patch:
        patch.setattr(module, "explicit_expert_comm", True)
        muted = {"layer 1 mlp.linear_fc2": "already muted by Megatron, which sums it elsewhere"}
        assert find_sync_points(model)[1] == muted
    with monkeypatch.context() as patch:
        patch.setattr(module, "__class__", type("TERowParallelLinear", (torch.nn.Module,), {}))
        refused(model, index, "layer 1 mlp.linear_fc2 is a TERowParallelLinear")
    refused(torch.nn.Linear(2, 2), index, "Linear has no Megatron-core transformer layer")


@pytest.mark.parametrize("kind", ["shared", "quantized"])
def test_weights_that_cannot_be_folded(model, index, monkeypatch, kind):
    layer = model.decoder.layers[0].mlp
    weight = layer.linear_fc2.weight
    if kind == "shared":
        monkeypatch.setattr(layer, "other", torch.nn.Linear(1, 1), raising=False)
        layer.other.weight = weight
        text = "weight of layer 1 mlp.linear_fc2 is shared with another module"
    else:
        monkeypatch.setattr(weight, "data", weight.data.to(torch.float8_e4m3fn))
        text = "weight of layer 1 mlp.linear_fc2 is quantized"
    refused(model, index, text, collective="one-shot", fold=True)


def test_a_model_that_is_not_finite_is_not_calibrated(model):
    broken = build(torch.bfloat16)
    with torch.no_grad():
        broken.decoder.layers[1].mlp.linear_fc2.weight[0, 0] = torch.nan
    said = message(lambda: index_of(broken))
    assert "sequence 0: not finite at layer 2 mlp.linear_fc2" in said
