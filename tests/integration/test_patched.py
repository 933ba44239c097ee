"""Low bits in a patched Megatron: the newest release and 0.16.1, or all with LOWBIT_PATCHED=all."""

import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from on_ranks import directory_of_all
from releases import NEWEST, RELEASES, ROOT
from small_gpt import (
    LENGTH,
    VOCAB,
    assert_alike,
    build,
    low,
    make_index,
    message,
    start_megatron,
    whole_logits,
)
from test_patches import folder, patchctl

import megatron_lowbit
from megatron_lowbit.integration.sums import routes
from megatron_lowbit.integration.sums.sync_points import find_sync_points

UNPATCHED = (routes.LocalRoute(),)
EVERY = os.environ.get("LOWBIT_PATCHED") == "all"
OLD = [release for release in RELEASES if release != NEWEST] if EVERY else ["0.16.1"]


def patched(release: str, directory: Path) -> str:
    """The PYTHONPATH of a patched copy of a release, in `directory`."""
    tree = directory / "tree"
    shutil.copytree(folder(release) / "megatron", tree / "megatron")
    patchctl("apply", tree)
    return os.pathsep.join([str(tree), str(ROOT)])


def in_ranks(release: str, ranks: int):
    return pytest.param(release, marks=pytest.mark.on_ranks(ranks, path=patched))


@pytest.fixture(
    scope="module", params=[in_ranks(NEWEST, 3), *(in_ranks(release, 2) for release in OLD)]
)
def release(request):
    from megatron.core.tensor_parallel import layers

    assert Path(layers.__file__).is_relative_to(directory_of_all("tree"))
    start_megatron(request.param)
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "sequence parallel"])
def model(release, request):
    return build(torch.bfloat16, sequence_parallel=request.param)


@pytest.fixture(scope="module")
def index(model):
    return make_index(model, directory_of_all(f"index {model.config.sequence_parallel}"))[0]


def row_parallel(model) -> list:
    """The row-parallel linears of a model's layers."""
    layers = model.decoder.layers
    return [m for layer in layers for m in (layer.self_attention.linear_proj, layer.mlp.linear_fc2)]


def gradient(model) -> torch.Tensor:
    """The gradient of a weight under the first sync point."""
    tokens = (torch.arange(LENGTH) % VOCAB)[None]
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    model.zero_grad()
    model(tokens, torch.arange(LENGTH)[None], mask).float().square().mean().backward()
    return model.decoder.layers[0].mlp.linear_fc1.weight.grad.clone()


def numbers(model, handle) -> list[torch.Tensor]:
    """Logits, a gradient, and the calls of each sync point."""
    found = [whole_logits(model)]
    if not model.config.sequence_parallel:  # whose buffers `logits` made, for inference
        found.append(gradient(model))
    return [*found, torch.tensor([point.traffic.calls for point in handle.status()])]


@pytest.mark.parametrize("collective", ["one-shot", "two-shot"])
def test_bits_are_those_without_the_patch(model, index, collective):
    """A patched linear is neither muted nor given a hook."""
    native, state, seen = whole_logits(model), list(model.state_dict()), []
    for table in (routes.ROUTES, UNPATCHED):
        with (
            mock.patch.object(routes, "ROUTES", table),
            low(model, index, collective=collective) as handle,
        ):
            linears = row_parallel(model)
            assert {linear.explicit_expert_comm for linear in linears} == {table is UNPATCHED}
            assert any(linear._forward_hooks for linear in linears) == (table is UNPATCHED)
            assert list(model.state_dict()) == state
            seen.append(numbers(model, handle))
    got, plain = seen
    assert all(torch.equal(*both) for both in zip(got, plain, strict=True))
    assert not torch.equal(got[0], native)
    assert all(values.abs().max() > 0 for values in got)
    assert got[-1].min() > 0
    assert_alike(got[0])
    assert torch.equal(whole_logits(model), native)
    assert not [name for m in model.modules() for name in vars(m) if "lowbit" in name]


def test_a_linear_that_adds_its_bias_itself_is_a_sync_point(release):
    """With the bits of a linear whose layer adds it; without the patch it cannot be taken over."""
    model = build(torch.bfloat16, bias=True)
    index, _ = make_index(model, directory_of_all("bias"))
    seen = []
    for skip in (True, False):
        for linear in row_parallel(model):
            linear.skip_bias_add = skip
        with low(model, index):
            seen.append(whole_logits(model))
    assert torch.equal(*seen)
    with mock.patch.object(routes, "ROUTES", UNPATCHED):
        said = message(lambda: megatron_lowbit.apply(model, index))
    assert "adds its bias itself" in said


def test_a_linear_that_does_not_ask_the_hook_is_taken_over_as_without_the_patch(model, monkeypatch):
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    class Own(RowParallelLinear):
        """A fork's linear that reduces without asking the hook."""

        def forward(self, input_):
            return super().forward(input_)

    linear = row_parallel(model)[0]
    assert type(routes.route_of(linear)) is routes.PatchedRoute
    monkeypatch.setattr(linear, "__class__", Own)
    assert type(routes.route_of(linear)) is routes.LocalRoute


def test_a_linear_that_is_attached_is_left_alone(model, index):
    with low(model, index):
        said = message(lambda: megatron_lowbit.apply(model, index))
    assert "is already attached" in said


def test_a_linear_that_megatron_muted_is_left_alone(model, monkeypatch):
    monkeypatch.setattr(row_parallel(model)[0], "explicit_expert_comm", True)
    reason = "already muted by Megatron, which sums it elsewhere"
    assert find_sync_points(model)[1] == {"layer 1 self_attention.linear_proj": reason}
