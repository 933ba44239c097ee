"""Low bits in a patched Megatron: the newest release and 0.16.1, or all with LOWBIT_PATCHED=all.

Run as a script, this file is a rank, and asserts there what its functions say.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from forks import forked
from releases import NEWEST, RELEASES, ROOT
from small_gpt import LENGTH, VOCAB, build, make_index, message, whole_logits
from test_patches import folder, patchctl

import megatron_lowbit
from megatron_lowbit.integration.cpu.device import enable_cpu
from megatron_lowbit.integration.sums import routes
from megatron_lowbit.integration.sums.sync_points import find_sync_points

UNPATCHED = (routes.LocalRoute(),)
EVERY = os.environ.get("LOWBIT_PATCHED") == "all"
OLD = [release for release in RELEASES if release != NEWEST] if EVERY else ["0.16.1"]


@pytest.mark.parametrize(("release", "ranks"), [(NEWEST, 3), *((release, 2) for release in OLD)])
def test_a_patched_megatron_sums_in_low_bits(release, ranks, tmp_path):
    run(release, ranks, "sums", tmp_path)


def test_megatron_loads_a_checkpoint_in_low_bits(calibrated, tmp_path):
    said = run(NEWEST, 3, "training", tmp_path, calibrated)
    assert said.count("this Megatron is patched and the launcher runs it") == 1, "on one rank"


def run(release: str, ranks: int, check: str, out: Path, *checkpoint: Path) -> str:
    """What ranks in a patched copy of a release print that make a check."""
    tree = out / "tree"
    shutil.copytree(folder(release) / "megatron", tree / "megatron")
    patchctl("apply", tree)
    path = os.pathsep.join([str(tree), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = forked(ranks, Path(__file__), check, out, *checkpoint, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


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


def bits_are_those_without_the_patch(model, index) -> None:
    """Logits, gradients and calls; a patched linear is neither muted nor given a hook."""
    native, state = whole_logits(model), list(model.state_dict())
    for mode in ("one-shot", "two-shot"):
        seen = []
        for table in (routes.ROUTES, UNPATCHED):
            with mock.patch.object(routes, "ROUTES", table):
                handle = megatron_lowbit.apply(model, index, collective=mode)
                linears = row_parallel(model)
                is_muted = {linear.explicit_expert_comm for linear in linears}
                assert is_muted == {table is UNPATCHED}
                assert any(linear._forward_hooks for linear in linears) == (table is UNPATCHED)
                assert list(model.state_dict()) == state
                seen.append([whole_logits(model)])
                if not model.config.sequence_parallel:  # whose buffers `logits` made, for inference
                    seen[-1].append(gradient(model))
                seen[-1].append(torch.tensor([s.traffic.calls for s in handle.status()]))
                handle.remove()
        patched, plain = seen
        assert all(torch.equal(*both) for both in zip(patched, plain, strict=True))
        assert not torch.equal(patched[0], native)
        assert all(values.abs().max() > 0 for values in patched) and patched[-1].min() > 0
        first = patched[0].clone()
        dist.broadcast(first, 0)
        assert torch.equal(patched[0], first), "on every rank"
    assert torch.equal(whole_logits(model), native)
    assert not [name for m in model.modules() for name in vars(m) if "lowbit" in name]


def a_linear_that_adds_its_bias_itself_is_a_sync_point(out: Path) -> None:
    """With the bits of a linear whose layer adds it; without the patch it cannot be taken over."""
    model = build(torch.bfloat16, bias=True)
    index, _ = make_index(model, out)
    seen = []
    for skip in (True, False):
        for module in row_parallel(model):
            module.skip_bias_add = skip
        handle = megatron_lowbit.apply(model, index, collective="one-shot")
        seen.append(whole_logits(model))
        handle.remove()
    assert torch.equal(*seen)
    with mock.patch.object(routes, "ROUTES", UNPATCHED):
        said = message(lambda: megatron_lowbit.apply(model, index))
    assert "adds its bias itself" in said, said


def some_linears_are_left_alone(model, index) -> None:
    """Those that do not read the hook, that are attached, and that Megatron muted."""
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    class Own(RowParallelLinear):
        """A fork's linear that reduces without asking the hook."""

        def forward(self, input_):
            return super().forward(input_)

    module = find_sync_points(model)[0][0].module
    assert type(routes.route_of(module)) is routes.PatchedRoute
    module.__class__ = Own
    assert type(routes.route_of(module)) is routes.LocalRoute
    module.__class__ = RowParallelLinear
    handle = megatron_lowbit.apply(model, index)
    assert "is already attached" in message(lambda: megatron_lowbit.apply(model, index))
    handle.remove()
    module.explicit_expert_comm = True
    muted = find_sync_points(model)[1]
    reason = "already muted by Megatron, which sums it elsewhere"
    assert muted == {"layer 1 self_attention.linear_proj": reason}, muted
    module.explicit_expert_comm = False


def sums(out: Path) -> None:
    """All that needs no checkpoint."""
    dist.init_process_group("gloo")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(dist.get_world_size())
    model = build(torch.bfloat16)
    index, _ = make_index(model, out)
    bits_are_those_without_the_patch(model, index)
    parallel = build(torch.bfloat16, sequence_parallel=True)
    bits_are_those_without_the_patch(parallel, make_index(parallel, out / "sp")[0])
    a_linear_that_adds_its_bias_itself_is_a_sync_point(out / "bias")
    some_linears_are_left_alone(model, index)


def training(out: Path, checkpoint: Path) -> None:
    """A checkpoint loaded by megatron.training with --lowbit-tp-comm among Megatron's arguments."""
    from megatron_lowbit.integration import hooks
    from megatron_lowbit.integration.runtime import session
    from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args
    from megatron_lowbit.model.forward import logits

    our_arguments_are_there_where_they_can_be_met()
    fixed = ["--lowbit-collective", "two-shot"]
    args = parse_megatron_args(["--load", str(checkpoint), "--lowbit-tp-comm", *fixed])
    session.initialize(args)
    model = session.load_model(args)
    tokens = torch.arange(LENGTH)[None] * 7 % VOCAB
    (hooked,) = hooks._on
    assert "4 sync points use shaped-hybrid" in str(hooked.handle), hooked.handle
    low = logits(model, tokens)
    assert hooks.checkpoint_loaded(model) is None  # what the launcher does after loading
    assert torch.equal(logits(model, tokens), low), "summed once"
    hooked.handle.remove()
    with mock.patch.object(routes, "ROUTES", UNPATCHED):
        handle = megatron_lowbit.apply(model, checkpoint / "lowbit", collective="two-shot")
        assert torch.equal(logits(model, tokens), low)
        handle.remove()
    native = logits(model, tokens)
    assert not torch.equal(low, native)
    args.lowbit_tp_comm = args.lowbit_collective = None
    other = session.load_model(args)
    assert torch.equal(logits(other, tokens), native), "without the flag"
    args.lowbit_tp_comm, args.load = str(checkpoint / "lowbit"), str(out / "empty")
    args.exit_on_missing_checkpoint = False
    from megatron.training.checkpointing import load_checkpoint

    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    with contextlib.redirect_stdout(io.StringIO()):
        said = message(lambda: load_checkpoint([other], None, None))
    assert "was calibrated on other weights" in said, said
    assert len(hooks._on) == 1
    session.shutdown()


def our_arguments_are_there_where_they_can_be_met() -> None:
    """In Megatron's parser: with this package installed, without it, and asked for without it."""
    from megatron.training.arguments import add_megatron_arguments

    def has_group(*argv: str) -> bool:
        with mock.patch.object(sys, "argv", ["script", *argv]):
            parser = add_megatron_arguments(argparse.ArgumentParser())
        return "--lowbit-tp-comm" in parser._option_string_actions

    assert has_group()
    with mock.patch.object(importlib.util, "find_spec", lambda name: None):
        assert not has_group()
        assert has_group("--lowbit-tp-comm")


if __name__ == "__main__":
    enable_cpu()
    torch.set_num_threads(1)
    check, out, *checkpoint = sys.argv[1:]
    from megatron.core.tensor_parallel import layers

    assert Path(layers.__file__).is_relative_to(Path(out) / "tree")
    globals()[check](Path(out), *map(Path, checkpoint))
