"""Checks of `apply` in a patched Megatron; run by test_patches.py in forked ranks.

With CHECKPOINT also those of megatron.training: its arguments and its loading. Rank by rank writes
what it saw to OUT/rankN.pt; the assertions are in test_patches.py.
"""

import argparse
import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from core_worker import LENGTH, VOCAB, build, make_index, message, whole_logits

import megatron_lowbit
from megatron_lowbit.integration.cpu.device import enable_cpu
from megatron_lowbit.integration.sums import routes
from megatron_lowbit.integration.sums.sync_points import find_sync_points

UNPATCHED = (routes.LocalRoute(),)
MODES = ("one-shot", "two-shot")


def gradient(model) -> torch.Tensor:
    """The gradient of a weight under the first sync point."""
    tokens = (torch.arange(LENGTH) % VOCAB)[None]
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    model.zero_grad()
    model(tokens, torch.arange(LENGTH)[None], mask).float().square().mean().backward()
    return model.decoder.layers[0].mlp.linear_fc1.weight.grad.clone()


def both_routes(model, index) -> dict:
    """Logits and gradients through the patch, and by muting as without it."""
    result = {"native": whole_logits(model), "state": list(model.state_dict())}
    for mode in MODES:
        for name, table in (("patched", routes.ROUTES), ("unpatched", UNPATCHED)):
            with mock.patch.object(routes, "ROUTES", table):
                handle = megatron_lowbit.apply(model, index, collective=mode)
                points = find_attached(model)
                result[name, mode] = whole_logits(model)
                if not model.config.sequence_parallel:  # whose buffers `logits` made, for inference
                    result[name, mode, "gradient"] = gradient(model)
                result[name, mode, "calls"] = [s.traffic.calls for s in handle.status()]
                result[name, mode, "muted"] = [m.explicit_expert_comm for m in points]
                result[name, mode, "hooks"] = [len(m._forward_hooks) for m in points]
                result[name, mode, "state"] = list(model.state_dict())
                handle.remove()
    result["left"] = [name for m in model.modules() for name in vars(m) if "lowbit" in name]
    result["restored"] = torch.equal(whole_logits(model), result["native"])
    return result


def find_attached(model) -> list:
    """The row-parallel linears of a model's layers."""
    layers = model.decoder.layers
    return [m for layer in layers for m in (layer.self_attention.linear_proj, layer.mlp.linear_fc2)]


def own_bias(out: Path) -> dict:
    """Linears that add their bias themselves, which without the patch cannot be taken over."""
    model = build(torch.bfloat16, bias=True)
    index, _ = make_index(model, out)
    result = {}
    handle = megatron_lowbit.apply(model, index, collective="one-shot")
    result["beside"] = whole_logits(model)
    handle.remove()
    for module in find_attached(model):
        module.skip_bias_add = False
    handle = megatron_lowbit.apply(model, index, collective="one-shot")
    result["inside"] = whole_logits(model)
    handle.remove()
    with mock.patch.object(routes, "ROUTES", UNPATCHED):
        result["unpatched"] = message(lambda: megatron_lowbit.apply(model, index))
    return result


def refusals(model, index) -> dict:
    """What must be said, and which linears are not taken."""
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    class Own(RowParallelLinear):
        """A fork's linear that reduces without asking the hook."""

        def forward(self, input_):
            return super().forward(input_)

    point = find_sync_points(model)[0][0]
    result = {"route": type(routes.route_of(point.module)).__name__}
    point.module.__class__ = Own
    result["own"] = type(routes.route_of(point.module)).__name__
    point.module.__class__ = RowParallelLinear
    handle = megatron_lowbit.apply(model, index)
    result["twice"] = message(lambda: megatron_lowbit.apply(model, index))
    handle.remove()
    point.module.explicit_expert_comm = True
    result["muted"] = find_sync_points(model)[1]
    point.module.explicit_expert_comm = False
    return result


def training(checkpoint: Path, out: Path) -> dict:
    """A checkpoint loaded by megatron.training with --lowbit-tp-comm among Megatron's arguments."""
    from megatron_lowbit.integration import hooks
    from megatron_lowbit.integration.runtime import session
    from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args
    from megatron_lowbit.model.forward import logits

    fixed = ["--lowbit-collective", "two-shot"]
    args = parse_megatron_args(["--load", str(checkpoint), "--lowbit-tp-comm", *fixed])
    session.initialize(args)
    model = session.load_model(args)
    tokens = torch.arange(LENGTH)[None] * 7 % VOCAB
    result = {"handles": [str(model.handle) for model in hooks._on]}
    result["hooked"] = logits(model, tokens)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result["again"] = hooks.checkpoint_loaded(model)  # what the launcher does after loading
    result["said"] = said.getvalue()
    result["hooked again"] = logits(model, tokens)
    hooks._on[0].handle.remove()
    with mock.patch.object(routes, "ROUTES", UNPATCHED):
        handle = megatron_lowbit.apply(model, checkpoint / "lowbit", collective="two-shot")
        result["unpatched"] = logits(model, tokens)
        handle.remove()
    result["native"] = logits(model, tokens)
    args.lowbit_tp_comm = args.lowbit_collective = None
    other = session.load_model(args)
    result["without the flag"] = torch.equal(logits(other, tokens), result["native"])
    args.lowbit_tp_comm, args.load = str(checkpoint / "lowbit"), str(out / "empty")
    args.exit_on_missing_checkpoint = False
    from megatron.training.checkpointing import load_checkpoint

    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    with contextlib.redirect_stdout(io.StringIO()):
        result["not found"] = message(lambda: load_checkpoint([other], None, None))
    result["made"] = len(hooks._on)
    session.shutdown()
    return result


def argument_groups() -> dict[str, bool]:
    """Whether Megatron's parser has our group, with this package installed and without it."""
    from megatron.training.arguments import add_megatron_arguments

    def has_group() -> bool:
        parser = add_megatron_arguments(argparse.ArgumentParser())
        return "--lowbit-tp-comm" in parser._option_string_actions

    absent = mock.patch.object(importlib.util, "find_spec", lambda name: None)
    found = {"installed": has_group()}
    with absent:
        found["absent"] = has_group()
        with mock.patch.object(sys, "argv", ["script", "--lowbit-tp-comm"]):
            found["absent, but asked for"] = has_group()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    options = parser.parse_args()
    out = options.out
    enable_cpu()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    import megatron.core
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers

    parallel_state.initialize_model_parallel(dist.get_world_size())
    model = build(torch.bfloat16)
    index, _ = make_index(model, out)
    parallel = build(torch.bfloat16, sequence_parallel=True)
    results = {
        "version": megatron.core.__version__,
        "file": layers.__file__,
        "plain": both_routes(model, index),
        "sequence_parallel": both_routes(parallel, make_index(parallel, out / "sp")[0]),
        "own_bias": own_bias(out / "bias"),
        "refusals": refusals(model, index),
    }
    if options.checkpoint:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        results["training"] = training(options.checkpoint, out)
        results["groups"] = argument_groups()
    torch.save(results, out / f"rank{results_rank()}.pt")


def results_rank() -> int:
    """This process's rank; the process group may be gone."""
    import os

    return int(os.environ["RANK"])


if __name__ == "__main__":
    main()
