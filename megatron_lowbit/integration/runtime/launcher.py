"""Running a Megatron-LM script as it is, with `--lowbit-tp-comm` among its arguments.

The script builds its parser, its model and loads its checkpoint through `megatron.training`. Before
it starts, `install` puts itself in the way at three places, whatever the release:

- `megatron.training.arguments.add_megatron_arguments`, which every parser goes through (it is
  looked up at call time): the argument group joins it, and what a machine without CUDA cannot do is
  switched off when it has parsed;
- `megatron.training.checkpointing.load_checkpoint`, under every name that it is bound to: when it
  returns, the model is switched to low bits;
- `load_args_from_checkpoint` there: it brings the tokenizer's path, and a checkpoint that was moved
  has its tokenizer beside it.

It goes by what Megatron has parsed, wherever the script has it from. A low-bit argument that stands
on the launcher's command line and was not parsed is an error (`integration.wanted`).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch

from megatron_lowbit.at_end import do_steps, fail
from megatron_lowbit.cli import say
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration import hooks, wanted
from megatron_lowbit.integration.cpu.attention import enable_cpu_engines
from megatron_lowbit.integration.cpu.device import enable_cpu
from megatron_lowbit.integration.cpu.training import enable_cpu_training
from megatron_lowbit.integration.rebinding import rebind
from megatron_lowbit.integration.runtime import megatron_args
from megatron_lowbit.integration.runtime.model_files import refuse_own_code

_CHECKOUT = "MEGATRON_LM"


class Launch:
    """A script's run, and what it did of what low bits need, so that nothing is silently off."""

    def __init__(self, script: str, argv: list[str]):
        self._script, self._argv = script, argv
        self._built_parser = self._parsed = False
        self._tokenizer: dict[str, str] = {}

    def install(self) -> None:
        """Step into `megatron.training`; call it before the script is read.

        Raises:
            LowbitError: There is no `megatron.training`.
        """
        on_cpu = enable_cpu()
        if on_cpu:
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        megatron_args.require_megatron_training(
            remedy=f"set {_CHECKOUT}=DIR to a checkout of Megatron-LM"
        )
        from megatron.training import arguments, checkpointing

        if on_cpu:
            enable_cpu_training()
            enable_cpu_engines()
        arguments.add_megatron_arguments = self._with_group(arguments.add_megatron_arguments)
        rebind(checkpointing.load_checkpoint, self._with_low_bits(checkpointing.load_checkpoint))
        read_args = checkpointing.load_args_from_checkpoint
        rebind(read_args, self._with_tokenizer(read_args))
        self._see_early_exit()

    def ended(self) -> None:
        """The script ended by itself: raise unless low bits were on, if they were asked for.

        Raises:
            LowbitError: It never built Megatron's parser, or never loaded a checkpoint, or what is
                to be written at the end cannot be.
        """
        if not self._built_parser:
            raise LowbitError(
                f"{self._script} ended without megatron.training's arguments: the launcher is for "
                "scripts that parse them"
            )
        if self._parsed:
            self._compare()
        do_steps()

    def _compare(self) -> None:
        """See that the low-bit arguments of the command line are what Megatron's parser got."""
        unparsed = wanted.unparsed(self._argv)
        if unparsed and wanted.FLAG not in unparsed:
            raise LowbitError(self._unparsed(unparsed[0]))

    def _unparsed(self, flag: str) -> str:
        return (
            f"{flag} is on the launcher's command line, but not among what Megatron parsed: "
            f"{self._script} builds its own argument list, put it there"
        )

    def stopped(self) -> None:
        """The script was stopped, as servers are: keep what --lowbit-stats asks for."""
        hooks.write_stats_now()

    def _see_early_exit(self) -> None:
        """`os._exit`, by which Megatron's scripts end after CUDA graphs, is an end, too."""
        leave, process = os._exit, os.getpid()

        def exit_seen(status: int) -> NoReturn:
            if status == 0 and os.getpid() == process:
                try:
                    self.ended()
                except LowbitError as error:
                    fail(error)
            leave(status)

        os._exit = exit_seen

    def _with_group(self, original):
        @functools.wraps(original)
        def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            self._built_parser = True
            parser = hooks.add_arguments(original(parser))
            self._prepare(parser)
            return parser

        return add_megatron_arguments

    def _prepare(self, parser: argparse.ArgumentParser) -> None:
        """One-line errors, a `--help` that works, and arguments that this machine can run."""
        parse = parser.parse_known_args
        megatron_args.one_line_errors(parser)

        def parse_known_args(argv=None, namespace=None):
            megatron_args.escape_help(parser)  # now: the script has added its own arguments
            parsed, rest = parse(argv, namespace)
            words = sys.argv[1:] if argv is None else argv
            given = megatron_args.given_names(parser, words)
            if not torch.cuda.is_available():
                _fit(parsed, given)
            self._tokenizer = megatron_args.named_tokenizer(parsed, given)
            _check_tokenizer(parsed)
            self._parsed = True
            if wanted.FLAG in wanted.unparsed(self._argv):
                wanted.expect(self._unparsed(wanted.FLAG))
            return parsed, rest

        parser.parse_known_args = parse_known_args

    def _with_tokenizer(self, original):
        @functools.wraps(original)
        def load_args_from_checkpoint(args, *more, **kwargs):
            result = original(args, *more, **kwargs)
            if args.load is not None:
                megatron_args.find_tokenizer(args, self._tokenizer)
            _check_tokenizer(args)
            return result

        return load_args_from_checkpoint

    def _with_low_bits(self, original):
        @functools.wraps(original)
        def load_checkpoint(ddp_model, *args, **kwargs):
            result = original(ddp_model, *args, **kwargs)
            self._compare()
            hooks.checkpoint_loaded(ddp_model)
            if not hooks.is_on() and not wanted.is_expected():
                say(f"> native communication: no {wanted.FLAG}")
            return result

        return load_checkpoint


def _fit(args: argparse.Namespace, given: set[str]) -> None:
    """Switch off what a CPU or local layers lack, and say what was changed in one line."""
    before = dict(vars(args))
    megatron_args.fit_to_machine(args, given)
    changed = [f"{name}={value}" for name, value in vars(args).items() if before.get(name) != value]
    if changed:
        say(f"> no CUDA here, so: {', '.join(changed)}")


def _check_tokenizer(args: argparse.Namespace) -> None:
    """Refuses a tokenizer with code of its own: older Megatrons would ask on stdin to run it."""
    path = Path(str(getattr(args, "tokenizer_model", None)))
    if path.is_dir() and not getattr(args, "trust_remote_code", False):
        refuse_own_code(path)


def use_checkout(script: Path | None) -> None:
    """Put the Megatron-LM checkout that is meant first on `sys.path`, if there is one.

    Args:
        script: The script, whose own checkout counts; None for a module.

    Raises:
        LowbitError: `MEGATRON_LM` is no checkout, or another one than the script lies in.
    """
    own = next(filter(_is_checkout, script.resolve().parents), None) if script else None
    named = os.environ.get(_CHECKOUT)
    if named and not _is_checkout(Path(named)):
        raise LowbitError(
            f"{_CHECKOUT}={named} is no Megatron-LM checkout: it has no megatron/core"
        )
    if own and named and Path(named).resolve() != own:
        raise LowbitError(
            f"{script} lies in the checkout {own}, and {_CHECKOUT} names {named}: unset it"
        )
    root = own or (Path(named).resolve() if named else None)
    if root is not None:
        sys.path.insert(0, str(root))
        # Processes that the script starts need it, too.
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def _is_checkout(directory: Path) -> bool:
    return (directory / "megatron" / "core" / "__init__.py").is_file()
