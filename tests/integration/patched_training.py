"""What megatron.training does with --lowbit-tp-comm where Megatron is patched.

A script that asserts in each rank; test_patched.py runs it. Its arguments: a checkpoint that has an
index, and the folder of the patched copy.
"""

import argparse
import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from unittest import mock

import torch
from megatron.core.tensor_parallel import layers
from megatron.training.arguments import add_megatron_arguments
from megatron.training.checkpointing import load_checkpoint
from small_gpt import LENGTH, VOCAB, message

import megatron_lowbit
from megatron_lowbit.integration import hooks
from megatron_lowbit.integration.runtime import session
from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args
from megatron_lowbit.integration.sums import routes
from megatron_lowbit.model.forward import logits

TOKENS = torch.arange(LENGTH)[None] * 7 % VOCAB


def arguments_are_there_where_they_can_be_met() -> None:
    """In Megatron's parser: with this package installed, without it, and asked for without it."""

    def has_group(*argv: str) -> bool:
        with mock.patch.object(sys, "argv", ["script", *argv]):
            parser = add_megatron_arguments(argparse.ArgumentParser())
        return "--lowbit-tp-comm" in parser._option_string_actions

    assert has_group()
    with mock.patch.object(importlib.util, "find_spec", lambda name: None):
        assert not has_group()
        assert has_group("--lowbit-tp-comm")


def a_loaded_model_is_in_low_bits(model, index: Path) -> torch.Tensor:
    """Once, with the bits of `apply` without the patch; gives its native logits."""
    (hooked,) = hooks._on
    assert "4 sync points use shaped-hybrid" in str(hooked.handle), hooked.handle
    low = logits(model, TOKENS)
    assert hooks.checkpoint_loaded(model) is None  # what the launcher does after loading
    assert torch.equal(logits(model, TOKENS), low), "summed once"
    hooked.handle.remove()
    with mock.patch.object(routes, "ROUTES", (routes.LocalRoute(),)):
        handle = megatron_lowbit.apply(model, index, collective="two-shot")
        assert torch.equal(logits(model, TOKENS), low)
        handle.remove()
    native = logits(model, TOKENS)
    assert not torch.equal(low, native)
    return native


def other_weights_are_refused(model, args: argparse.Namespace, index: Path, empty: Path) -> None:
    """When a checkpoint is loaded, though here there is none."""
    args.lowbit_tp_comm, args.load = str(index), str(empty)
    args.exit_on_missing_checkpoint = False
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    with contextlib.redirect_stdout(io.StringIO()):
        said = message(lambda: load_checkpoint([model], None, None))
    assert "was calibrated on other weights" in said, said
    assert len(hooks._on) == 1


def main(checkpoint: Path, tree: Path) -> None:
    assert Path(layers.__file__).is_relative_to(tree)
    arguments_are_there_where_they_can_be_met()
    fixed = ["--lowbit-collective", "two-shot"]
    args = parse_megatron_args(["--load", str(checkpoint), "--lowbit-tp-comm", *fixed])
    session.initialize(args)
    native = a_loaded_model_is_in_low_bits(session.load_model(args), checkpoint / "lowbit")
    args.lowbit_tp_comm = args.lowbit_collective = None
    model = session.load_model(args)
    assert torch.equal(logits(model, TOKENS), native), "without the flag"
    other_weights_are_refused(model, args, checkpoint / "lowbit", tree / "empty")
    session.shutdown()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
