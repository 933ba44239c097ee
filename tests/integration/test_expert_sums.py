"""Routed experts in low bits: the sums of Megatron's token dispatchers, and no more of them."""

from contextlib import contextmanager
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from layer_models import gpt
from releases import NEWEST
from small_gpt import (
    HIDDEN,
    LENGTH,
    MOE,
    assert_alike,
    in_training,
    index_of,
    low,
    message,
    refusal,
    start_megatron,
    whole_logits,
    whole_vocabulary,
)

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.integration.sums import experts

pytestmark = pytest.mark.on_ranks(2)
# Experts on ranks of their own, each whole: alltoall has nothing to sum, allgather does.
APART = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
# Name: token dispatcher, sequence parallelism, Megatron's groups.
TRAINED = {
    "allgather sp": ("allgather", True, {}),
    "alltoall sp": ("alltoall", True, {}),
    "allgather apart": ("allgather", True, APART),
}
CASES = {**TRAINED, "allgather": ("allgather", False, {}), "alltoall": ("alltoall", False, {})}


def build(dispatcher: str, *, sequence_parallel: bool = False):
    """With a seed of which no token goes to another expert in low bits: each costs 10 to 15 dB."""
    router = None if sequence_parallel else "fp32"  # Megatron then sums in fp32
    choice = {"moe_token_dispatcher_type": dispatcher, "moe_router_dtype": router}
    return gpt(seed=7, **{**MOE, **choice}, sequence_parallel=sequence_parallel)


@pytest.fixture(scope="module", params=CASES)
def model(request):
    dispatcher, sequence_parallel, degrees = CASES[request.param]
    start_megatron(NEWEST, **degrees)
    return build(dispatcher, sequence_parallel=sequence_parallel)


@pytest.fixture(scope="module")
def native(model) -> torch.Tensor:
    return run(model)


def trained(model) -> torch.Tensor:
    """Logits in training, where a router has counts and losses; leaves gradients behind."""
    mine = in_training(model.train())
    generator = torch.Generator().manual_seed(3 + dist.get_rank())
    (mine.float() * torch.randn(mine.shape, generator=generator)).sum().backward()
    model.eval()
    return whole_vocabulary(mine[0].detach())


def run(model) -> torch.Tensor:
    return trained(model) if model.config.sequence_parallel else whole_logits(model)


def gradients(model) -> torch.Tensor:
    """Of what lies before the first sum of experts' outputs."""
    trained(model)
    (layer, _) = model.decoder.layers
    weights = [layer.self_attention.linear_qkv.weight, layer.mlp.router.weight]
    return torch.cat([weight.grad.flatten().float() for weight in weights])


def low_experts(model, index):
    """Routed experts in 6 bits, with exact sums elsewhere."""
    return low(model, index, codec="bf16", experts_bits=6)


@contextmanager
def summed_by_codec_bf16(model):
    """Experts' sums are exact in the context; gives the reduce-scatter that they call."""
    sums = experts.find_expert_sums(model, 4)
    for one in sums:
        one.codec = get_codec("bf16")
        one.tables = one.codec.tables(HIDDEN)
    with pytest.MonkeyPatch.context() as patch:
        called = Mock(wraps=experts.reduce_scatter)
        patch.setattr(experts, "reduce_scatter", called)
        undo = [one.attach() for one in sums]
        yield called
        for one in undo:
            one()


def assert_given_back(model, native: torch.Tensor) -> None:
    """Dispatchers sum by Megatron's own methods."""
    assert torch.equal(run(model), native)
    for layer in model.decoder.layers:
        ours = vars(layer.mlp.token_dispatcher).keys() & {"token_combine", "combine_preprocess"}
        assert not ours


def test_codec_bf16_sums_as_megatron_does(model, native):
    with summed_by_codec_bf16(model) as called:
        got = run(model)
    assert called.call_count == 2, "once a layer"
    assert sqnr(native, got) > 60
    assert_given_back(model, native)


def test_low_bits(model, index, native):
    with low_experts(model, index) as handle:
        got = run(model)
        text, stats, left = str(handle), handle.stats(), handle.native
    assert_alike(got)
    assert 25 < sqnr(native, got) < 50
    assert left == {}
    assert "; 2 token dispatchers in rotated-hybrid (6 bits); " in text
    assert text.endswith("; 0 stay native")
    names = [(one["layer"], one["name"]) for one in stats["experts"]]
    assert names == [(1, "mlp.token_dispatcher"), (2, "mlp.token_dispatcher")]
    for one in stats["experts"]:
        (choice,) = one["choices"]
        assert (choice["collective"], choice["calls"]) == ("reduce-scatter", 1)
        assert choice["sent_bytes"] == choice["payload_bytes"] / 2
        assert one["bits_per_value"] < 6.5
    assert_given_back(model, native)


def counts_and_losses(model) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of each layer's router, in training: tokens by expert, and the auxiliary loss."""
    from megatron.core.transformer.moe import moe_utils

    counts, losses, router = [], [], type(model.decoder.layers[0].mlp.router)
    reduce = moe_utils.reduce_from_tensor_model_parallel_region
    attach = router.attach_and_log_load_balancing_loss

    def reducing(*args, **kwargs):
        counts.append(reduce(*args, **kwargs).clone())
        return counts[-1]

    def attaching(self, activation, coefficient, loss, *args, **kwargs):
        losses.append(loss.detach().clone())
        return attach(self, activation, coefficient, loss, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_utils, "reduce_from_tensor_model_parallel_region", reducing)
        patch.setattr(router, "attach_and_log_load_balancing_loss", attaching)
        trained(model)
    return counts, losses


@pytest.mark.parametrize("model", TRAINED, indirect=True)
def test_token_counts_and_auxiliary_losses_stay_native(model, index):
    """Bit-identical where the router sees the same tokens: in the first layer; exact in all."""
    expected_counts, expected_losses = counts_and_losses(model)
    with low_experts(model, index):
        counts, losses = counts_and_losses(model)
    assert torch.equal(counts[0], expected_counts[0])
    assert torch.equal(losses[0], expected_losses[0])
    assert len(counts) == len(losses) == 2
    for layer in counts:
        assert layer.dtype == torch.int64
        assert layer.sum() == 2 * LENGTH, "two experts for each token"


@pytest.mark.parametrize("model", TRAINED, indirect=True)
def test_gradients(model, index):
    expected = gradients(model)
    with low_experts(model, index):
        assert sqnr(expected, gradients(model)) > 25


# The tests below make Megatron's groups anew, which the fixtures above would not outlive.


def test_experts_that_are_whole_on_their_ranks_are_not_summed():
    start_megatron(NEWEST, **APART)
    assert experts.find_expert_sums(build("alltoall"), 4) == []


def test_experts_bits_for_a_dense_model_are_refused():
    start_megatron(NEWEST)
    dense = gpt()
    said = refusal(dense, index_of(dense), experts_bits=4)
    assert "--lowbit-experts has nothing to sum" in said


def test_sums_that_cannot_be_taken_over_are_refused():
    start_megatron(NEWEST)
    model = build("allgather")
    said = message(lambda: experts.find_expert_sums(model, 9))
    assert "codec rotated-hybrid has no 9-bit version" in said
    flex = type("MoEFlexTokenDispatcher", (), {})
    model.decoder.layers[0].mlp.token_dispatcher.__class__ = flex
    said = message(lambda: experts.find_expert_sums(model, 4))
    text = "layer 1 mlp.token_dispatcher is a MoEFlexTokenDispatcher, which sums inside"
    assert text in said


@contextmanager
def uneven_over_gloo():
    """What Megatron's alltoall dispatcher needs for uneven blocks, and a CPU with Gloo has not.

    Megatron turns split sizes on CUDA into numbers, and leaves those on a CPU tensors; Gloo's
    all-gather and reduce-scatter take blocks of one size only.
    """
    from megatron.core.transformer.moe import token_dispatcher

    exchange, gather = token_dispatcher.all_to_all, dist.all_gather

    def all_to_all(group, x, *splits, **kwargs):
        return exchange(group, x, *(split.tolist() for split in splits), **kwargs)

    def all_gather(outputs, x, group=None):
        if all(out.shape == x.shape for out in outputs):
            return gather(outputs, x, group=group)
        most = max(map(len, outputs))
        parts = [out.new_empty(most, *out.shape[1:]) for out in outputs]
        mine = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
        gather(parts, mine, group=group)
        for out, part in zip(outputs, parts, strict=True):
            out.copy_(part[: len(out)])

    def reduce_scatter(output, inputs, group=None):
        total = torch.cat(inputs)
        dist.all_reduce(total, group=group)
        output.copy_(total.split([len(part) for part in inputs])[dist.get_rank(group)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_dispatcher, "all_to_all", all_to_all)
        patch.setattr(dist, "all_gather", all_gather)
        patch.setattr(dist, "reduce_scatter", reduce_scatter)
        yield


@pytest.mark.on_ranks(4)
def test_experts_that_split_their_tokens_unevenly():
    """alltoall with expert tensor parallelism 2 and expert parallelism 2."""
    start_megatron(NEWEST, 2, expert_model_parallel_size=2, expert_tensor_parallel_size=2)
    model = build("alltoall", sequence_parallel=True)
    with uneven_over_gloo():
        index = index_of(model)
        native, expected = run(model), gradients(model)
        with summed_by_codec_bf16(model) as called:
            assert sqnr(native, run(model)) > 60
        blocks = [call.kwargs["counts"] for call in called.call_args_list]
        assert any(a != b for a, b in blocks), blocks
        with low_experts(model, index):
            assert 25 < sqnr(native, run(model)) < 50
            assert sqnr(expected, gradients(model)) > 25
        assert_given_back(model, native)
