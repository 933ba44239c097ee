"""Transformer Engine's layers and the inference-optimized ones: Megatron's, over a stand-in."""

import inspect
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from releases import NEWEST, environment
from small_gpt import (
    HIDDEN,
    LAYERS,
    LENGTH,
    MOE,
    POINTS,
    assert_alike,
    build,
    gpt_model,
    in_training,
    index_of,
    low,
    message,
    refusal,
    start_megatron,
    whole_logits,
)
from te_models import counting, inference_spec, logits_and_calls, same_weights, te_spec

from megatron_lowbit.integration.sums import transformer_engine as route
from megatron_lowbit.integration.sums.simulate import find_summing
from megatron_lowbit.integration.sums.sync_points import (
    SyncPoint,
    attach,
    find_sync_points,
    fingerprint,
    transformer_layers,
)


def behind_the_stand_in(release: str, _) -> str:
    """It is there before Megatron is imported."""
    return os.pathsep.join([environment(release)["PYTHONPATH"], str(STAND_IN)])


STAND_IN = Path(__file__).with_name("te_stand_in")
pytestmark = pytest.mark.on_ranks(2, path=behind_the_stand_in)
TE = ["te", "te sequence-parallel"]
INFERENCE = "inference sequence-parallel"
FC2 = "layer 1 mlp.linear_fc2"
SPECS = {"te": te_spec, "inference": inference_spec}


# The stand-in has what these releases import of Transformer Engine; older ones import other names.
@pytest.fixture(scope="module", params=["0.16.1", NEWEST])
def release(request):
    from megatron.core import parallel_state

    start_megatron(request.param)
    if hasattr(parallel_state, "_set_global_symmetric_memory_buffer"):  # until 0.16
        parallel_state._set_global_symmetric_memory_buffer()
    return request.param


@pytest.fixture(scope="module", params=[*TE, INFERENCE])
def pair(release, request):
    """A model, and the local one that has its weights, with an index of it."""
    spec, *scatters = request.param.split()
    local = build(torch.bfloat16, sequence_parallel=bool(scatters))
    index = index_of(local)
    return SimpleNamespace(local=local, model=same_weights(local, SPECS[spec]()), index=index)


def test_low_bits_are_those_of_the_local_spec(pair):
    """The same partials through the same codec: bit for bit, and on all ranks."""
    found = []
    for model in (pair.local, pair.model):
        native = whole_logits(model)
        with low(model, pair.index) as handle:
            text, logits = str(handle), whole_logits(model)
            sent = [(p.traffic.calls, p.traffic.sent_bytes) for p in handle.status()]
        found.append((native, logits, sent))
    (local_native, local_logits, local_sent), (native, logits, sent) = found
    assert torch.equal(native, local_native)
    assert torch.equal(logits, local_logits)
    assert not torch.equal(logits, native)
    assert_alike(logits)
    assert sent == local_sent
    assert all(calls == 1 and count > 0 for calls, count in sent)
    assert f"{len(POINTS)} sync points use rotated-hybrid" in text
    assert f"errors carried between {len(POINTS)} sync points" in text


def test_te_sends_nothing_for_as_long_as_it_is_muted(pair):
    scatters = pair.local.config.sequence_parallel
    own = ["reduce_scatter_along_first_dim" if scatters else "allreduce"] * len(POINTS)
    native, calls = logits_and_calls(pair.model)
    assert calls == own
    with low(pair.model, pair.index):
        assert logits_and_calls(pair.model)[1] == []
    removed, calls = logits_and_calls(pair.model)
    assert calls == own
    assert torch.equal(removed, native)


def attributes(model) -> list[dict]:
    """Everything that the model's row-parallel linears hold, hooks included."""
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

    linears = [module for module in model.modules() if isinstance(module, TERowParallelLinear)]
    assert len(linears) == len(POINTS)
    return [{**vars(m), **m._parameters, "_forward_hooks": {**m._forward_hooks}} for m in linears]


def test_remove_leaves_nothing(pair):
    whole_logits(pair.model)
    before, keys = attributes(pair.model), list(pair.model.state_dict())
    with low(pair.model, pair.index):
        assert attributes(pair.model) != before
        whole_logits(pair.model)
        assert list(pair.model.state_dict()) == keys
    assert attributes(pair.model) == before


def test_an_index_serves_every_spec(pair):
    """TE keeps norms in the linears behind them; the weights' digests are the same."""
    mine, local = (
        [fingerprint(layer) for layer in transformer_layers(model).values()]
        for model in (pair.model, pair.local)
    )
    assert mine == local
    assert len(set(local)) == LAYERS


@pytest.mark.parametrize("pair", TE, indirect=True)
def test_calibration_finds_what_it_finds_in_the_local_spec(pair):
    index = index_of(pair.model)
    assert index.manifest["chain"] == pair.index.manifest["chain"]
    assert set(index.manifest["chain"].values()) == {""}
    for point in POINTS:
        mine, local = (each.record(*point).second_moment for each in (index, pair.index))
        assert torch.equal(mine, local)


@pytest.mark.parametrize("pair", TE, indirect=True)
def test_gradients_are_those_of_the_local_spec(pair):
    """In the backward pass only the column-parallel linears reduce, two in a layer."""
    gradients, calls = gradients_and_calls(pair.model, pair.index)
    expected, _ = gradients_and_calls(pair.local, pair.index)
    for mine, local in zip(gradients, expected, strict=True):
        assert torch.equal(mine, local)
        assert mine.abs().sum() > 0
    assert len(calls) == 2 * LAYERS


def gradients_and_calls(model, index) -> tuple[list[torch.Tensor], list[str]]:
    """Of the weights before and in a row-parallel linear, through the low-bit path."""
    with low(model, index), counting() as calls:
        in_training(model).float().square().mean().backward()
    mlp = model.decoder.layers[0].mlp
    return [linear.weight.grad.clone() for linear in (mlp.linear_fc1, mlp.linear_fc2)], calls


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("skip_bias_add", [False, True])
def test_a_bias_is_added_once_after_the_sum(release, sequence_parallel, skip_bias_add):
    """Output, bias and all gradients of a linear, muted and summed by Megatron's functions."""
    linear = linear_with_bias(sequence_parallel, skip_bias_add)
    native, calls = run_linear(linear)
    assert len(calls) == 1
    with attach([SyncPoint(1, "mlp.linear_fc2", module=linear)], [megatrons_sum]):
        muted, calls = run_linear(linear)
    assert calls == []
    again, calls = run_linear(linear)
    assert len(calls) == 1
    assert len(muted) == 4 + skip_bias_add
    assert (len(muted[0]) < LENGTH) == sequence_parallel
    for result in (muted, again):
        assert all(torch.equal(*both) for both in zip(result, native, strict=True))


def linear_with_bias(sequence_parallel: bool, skip_bias_add: bool):
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

    config = build(torch.bfloat16, bias=True).config
    config.sequence_parallel = sequence_parallel
    linear = TERowParallelLinear(
        HIDDEN,
        HIDDEN,
        config=config,
        init_method=config.init_method,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=skip_bias_add,
        is_expert=False,
    )
    torch.nn.init.normal_(linear.bias)
    return linear


def run_linear(linear) -> tuple[list[torch.Tensor], list[str]]:
    """Output, gradients, a bias that is given back; and TE's calls."""
    torch.manual_seed(7 + dist.get_rank())
    x = torch.randn(LENGTH, 1, HIDDEN // dist.get_world_size(), dtype=torch.bfloat16)
    x.requires_grad_()
    linear.zero_grad()
    with counting() as calls:
        out, bias = linear(x)
        total = out if bias is None else out + bias
        total.float().square().sum().backward()
    tensors = [out.detach(), x.grad, linear.weight.grad.clone(), linear.bias.grad.clone()]
    return tensors + ([] if bias is None else [bias.detach().clone()]), calls


def megatrons_sum(partial: torch.Tensor, scatter: bool) -> torch.Tensor:
    from megatron.core import tensor_parallel

    if scatter:
        return tensor_parallel.reduce_scatter_to_sequence_parallel_region(partial)
    return tensor_parallel.reduce_from_tensor_model_parallel_region(partial)


@pytest.mark.parametrize("pair", TE[:1], indirect=True)
def test_sequence_parallelism_that_is_switched_off_between_calls(pair):
    """As engines do for decoding: then it all-reduces, as a model that never had it."""
    from megatron.core.transformer.utils import set_model_to_sequence_parallel

    with low(pair.model, pair.index):
        expected = whole_logits(pair.model)
    model = same_weights(build(torch.bfloat16, sequence_parallel=True), te_spec())
    with low(model, pair.index) as handle:
        set_model_to_sequence_parallel(model, False)
        logits, calls = logits_and_calls(model)
        assert [choice["collective"] for choice in handle.stats()["total"]] == ["one-shot"]
    assert torch.equal(logits, expected)
    assert calls == []


def fc2_of(pair):
    return pair.model.decoder.layers[0].mlp.linear_fc2


def unmuted(model) -> str:
    """Why its sums cannot be had."""
    return message(lambda: find_sync_points(model))


@pytest.mark.parametrize(
    ("pair", "owner", "name", "value", "text"),
    [
        (TE[1], "linear", "ub_overlap_rs_fprop", True, "sums while .*leave out --tp-comm-overlap"),
        (TE[1], "config", "fp8", "hybrid", "is padded .* --sequence-parallel"),
        (TE[1], "linear", "tp_group", None, "has no tensor-parallel group"),
        (
            *(INFERENCE, "config", "inference_fuse_tp_communication", True),
            ".*--inference-fuse-tp-communication",
        ),
        (INFERENCE, "linear", "apply_bias", True, "adds its bias itself"),
        # In front of the parameter.
        (INFERENCE, "linear", "weight", object(), "has its weights as object already"),
    ],
    indirect=["pair"],
)
def test_sums_that_cannot_be_muted(pair, monkeypatch, owner, name, value, text):
    """The first sync point that has them is named."""
    model, linear, place = pair.model, fc2_of(pair), FC2
    if owner == "config":  # of all linears
        linear, place = linear.config, "layer 1 self_attention.linear_proj"
    with monkeypatch.context() as patch:
        patch.setitem(vars(linear), name, value)
        assert re.search(f"{place} {text}", unmuted(model)), unmuted(model)
    assert unmuted(model) == "no error"


@pytest.mark.parametrize("pair", TE[1:], indirect=True)
def test_another_transformer_engine(pair, monkeypatch):
    """One that has moved what is muted, or has a forward pass that does not read it."""
    model, linear = pair.model, fc2_of(pair)
    with monkeypatch.context() as patch:
        patch.delattr(linear, "gemm_bias_unfused_add")
        text = f"{FC2} has no gemm_bias_unfused_add.*--transformer-impl local"
        assert re.search(text, unmuted(model)), unmuted(model)
    with monkeypatch.context() as patch:
        own = {"forward": lambda self, x: (x, None)}
        patch.setattr(linear, "__class__", type("TunedLinear", (type(linear),), own))
        text = f"{FC2} has a forward pass of its own, .* TunedLinear"
        assert re.search(text, unmuted(model)), unmuted(model)
    renamed = inspect.getsource(type(linear).__mro__[2]).replace("self.parallel_mode", "self.mode")
    with monkeypatch.context() as patch:
        patch.setattr("inspect.getsource", lambda _: renamed)
        route.reads_in_forward.cache_clear()
        text = r"transformer_engine.*\.Linear\.forward reads no parallel_mode"
        assert re.search(text, unmuted(model)), unmuted(model)
    route.reads_in_forward.cache_clear()
    assert unmuted(model) == "no error"


@pytest.mark.parametrize("pair", TE[1:], indirect=True)
def test_wishes_that_need_the_local_spec(pair):
    model = pair.model
    said = refusal(model, pair.index, all_gather_bits=6)
    assert "--lowbit-all-gather has nothing to gather" in said
    said = message(lambda: find_summing(model, 3))
    assert re.search("--simulate-tp needs the local spec .* is a TERowParallelLinear", said), said
    assert unmuted(model) == "no error"


def test_an_mlp_that_never_calls_its_linear(release):
    said = unmuted(same_weights(build(torch.bfloat16), te_spec(use_te_op_fuser=True)))
    text = f"{FC2} .* TEFusedMLP .*--use-transformer-engine-op-fuser"
    assert re.search(text, said), said


@pytest.mark.parametrize("pair", TE[1:], indirect=True)
def test_a_linear_that_megatron_has_muted_stays_native(pair, monkeypatch):
    model, linear = pair.model, fc2_of(pair)
    monkeypatch.setattr(linear, "parallel_mode", None)
    _, native = find_sync_points(model)
    assert list(native) == [FC2]
    assert "already muted by Megatron" in native[FC2]


@pytest.mark.parametrize("latent", [None, 48])
def test_grouped_linears_of_routed_experts_stay_native(release, latent):
    """Those in a latent space, too, whose sums are not of the stream."""
    config = build(torch.bfloat16, **MOE, moe_grouped_gemm=True).config
    if latent and not hasattr(config, "moe_latent_size"):
        pytest.skip("this release has no latent experts")
    config.moe_latent_size = latent
    model = gpt_model(config, te_spec(num_experts=4, moe_grouped_gemm=True))
    points, native = find_sync_points(model)
    names = ["self_attention.linear_proj", "mlp.shared_experts.linear_fc2"]
    assert [str(point).split()[-1] for point in points] == 2 * names
    assert list(native) == [f"layer {n} mlp.token_dispatcher" for n in (1, 2)]
    assert hasattr(model.decoder.layers[0].mlp, "fc2_latent_proj") == (latent is not None)
