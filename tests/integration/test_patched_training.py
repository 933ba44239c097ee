"""What megatron.training does with --lowbit-tp-comm where Megatron is patched."""

import argparse
import importlib.util
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from on_ranks import directory_of_all
from small_gpt import LENGTH, VOCAB, message
from test_patched import patched

import megatron_lowbit
from megatron_lowbit.integration import hooks
from megatron_lowbit.integration.runtime import session
from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args
from megatron_lowbit.integration.sums import routes
from megatron_lowbit.model.forward import logits

pytestmark = pytest.mark.on_ranks(3, path=patched)
TOKENS = torch.arange(LENGTH)[None] * 7 % VOCAB


@pytest.fixture(scope="module")
def args(calibrated):
    from megatron.core.tensor_parallel import layers

    assert Path(layers.__file__).is_relative_to(directory_of_all("tree"))
    wanted = ["--lowbit-tp-comm", "--lowbit-collective", "two-shot"]
    args = parse_megatron_args(["--load", str(calibrated), *wanted])
    session.initialize(args)
    yield args
    session.shutdown()


def test_arguments_are_there_where_they_can_be_met():
    """In Megatron's parser: with this package installed, without it, and asked for without it."""
    from megatron.training.arguments import add_megatron_arguments

    def has_group(*argv: str) -> bool:
        with mock.patch("sys.argv", ["script", *argv]):
            parser = add_megatron_arguments(argparse.ArgumentParser())
        return "--lowbit-tp-comm" in parser._option_string_actions

    assert has_group()
    with mock.patch.object(importlib.util, "find_spec", lambda name: None):
        assert not has_group()
        assert has_group("--lowbit-tp-comm")


def test_a_loaded_model_is_in_low_bits(args, calibrated, capsys):
    """Once, with the bits of `apply` without the patch; natively where nobody asks for them."""
    model = session.load_model(args)
    (hooked,) = hooks._on
    assert "4 sync points use shaped-hybrid" in str(hooked.handle), hooked.handle
    low = logits(model, TOKENS)
    assert hooks.checkpoint_loaded(model) is None  # what the launcher does after loading
    said = "this Megatron is patched and the launcher runs it"
    assert capsys.readouterr().out.count(said) == (os.environ["RANK"] == "0")
    assert torch.equal(logits(model, TOKENS), low), "summed once"
    hooked.handle.remove()
    with mock.patch.object(routes, "ROUTES", (routes.LocalRoute(),)):
        handle = megatron_lowbit.apply(model, calibrated / "lowbit", collective="two-shot")
        assert torch.equal(logits(model, TOKENS), low)
        handle.remove()
    native = logits(model, TOKENS)
    assert not torch.equal(low, native)
    args.lowbit_tp_comm = args.lowbit_collective = None
    assert torch.equal(logits(session.load_model(args), TOKENS), native), "without the flag"


def test_other_weights_are_refused_when_they_are_loaded(args, calibrated, tmp_path):
    """Though here there is no checkpoint."""
    from megatron.training.checkpointing import load_checkpoint

    args.lowbit_tp_comm = args.lowbit_collective = None
    model, hooked = session.load_model(args), len(hooks._on)
    args.lowbit_tp_comm, args.load = str(calibrated / "lowbit"), str(tmp_path)
    args.exit_on_missing_checkpoint = False
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    said = message(lambda: load_checkpoint([model], None, None))
    assert "was calibrated on other weights" in said, said
    assert len(hooks._on) == hooked
