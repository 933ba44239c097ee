"""Low bits that were asked for are on, or the run fails and says so: they are never off in silence.

There are many ways to lose them: a script that loads its weights by other means, swallows an error,
replaces its arguments (`--yaml-cfg`), builds its own argument list, or serves for days before it
ends. So from the moment that somebody asks for low bits until a model is in low bits

- no row-parallel linear does its work: its first forward pass raises, before a token is out;
- the run does not end with status 0.

A model beside the one in low bits, which `load_checkpoint` has never loaded, may be meant
so (a draft model): one line says that it is native. The linears are guarded by a forward pre-hook
each, from when they are built until their model is loaded, so that a forward pass pays for nothing.

What was asked for is what Megatron's parser has parsed, not what stands on a command line.
"""

import argparse
import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from megatron_lowbit.at_end import at_end
from megatron_lowbit.cli import say
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.sums.routes import registered_route
from megatron_lowbit.integration.sums.sync_points import any_attached, is_attached

FLAG = "--lowbit-tp-comm"
_PREFIX = "--lowbit-"


_guards: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()


@dataclass
class _Asked:
    """What was asked for so far, and whether it is on."""

    # Names of low-bit arguments that some parser has parsed.
    given: set[str] = field(default_factory=set)
    # What to say if low bits are not on; empty if nobody wants them, or they were on.
    reason: str = ""
    was_on: bool = False
    is_watching: bool = False  # whether linears that are built now get a guard


_asked = _Asked()


def note(parsed: argparse.Namespace) -> None:
    """A parser has parsed: from now on what it was given is wanted."""
    names = {name for name, value in vars(parsed).items() if value is not None}
    _asked.given |= {name for name in names if name.startswith("lowbit_")}
    if "lowbit_tp_comm" in names:
        expect(
            f"{Path(sys.argv[0]).name} ended without loading a checkpoint: low bits were never on"
        )


def expect(reason: str) -> None:
    """Low bits are wanted, for which `reason` is the error if they do not come."""
    if _asked.was_on or any_attached():
        return
    if not _asked.reason:
        at_end(require_on)
    _asked.reason = reason
    if not _asked.is_watching:
        _asked.is_watching = True
        register_module_module_registration_hook(_guard)


def met() -> None:
    """A model is in low bits."""
    _asked.reason, _asked.was_on = "", True


def loaded(modules: Iterable[nn.Module]) -> None:
    """It is known of these whether they are in low bits: they need no guard."""
    for module in modules:
        guard = _guards.pop(module, None)
        if guard is not None:
            guard.remove()


def is_expected() -> bool:
    """Whether low bits are wanted and were not on so far."""
    return bool(_asked.reason)


def was_parsed() -> bool:
    """Whether a parser was given the flag."""
    return "lowbit_tp_comm" in _asked.given


def unparsed(words: list[str]) -> list[str]:
    """The low-bit arguments among the words of a command line that no parser was given."""
    flags = [word.split("=", 1)[0] for word in words if word.startswith(_PREFIX)]
    return [flag for flag in flags if flag[2:].replace("-", "_") not in _asked.given]


def check_words(parser: argparse.ArgumentParser, words: list[str], rest: list[str]) -> None:
    """End by the parser's error for a low-bit argument that it does not know, or was given twice.

    Of the `words` that it has parsed it does not know the `rest`, and Megatron's may ignore that.
    """
    unknown = [word for word in rest if word.startswith(_PREFIX)]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    flags = [word.split("=", 1)[0] for word in words if word.startswith(_PREFIX)]
    twice = [flag for flag in dict.fromkeys(flags) if flags.count(flag) > 1]
    if twice:
        parser.error(f"{twice[0]} is given {flags.count(twice[0])} times: give it once")


def require_on() -> None:
    """Raise LowbitError if low bits are wanted and have not been on; a step at the end of a run."""
    if _asked.reason and not any_attached() and not hasattr(sys, "last_value"):
        raise LowbitError(_asked.reason)


def _guard(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Of every module that becomes part of another: a row-parallel linear gets its guard."""
    kind: Any = type(module)
    if module is None or module in _guards:
        return
    if _is_row_parallel(kind) or registered_route(module) is not None:
        _guards[module] = module.register_forward_pre_hook(_refuse_forward)


def _refuse_forward(module: nn.Module, inputs: tuple) -> None:
    if _asked.reason and not any_attached():
        raise LowbitError(
            f"a {type(module).__name__} runs before low bits are on: {FLAG} needs a checkpoint "
            "that megatron.training's load_checkpoint loads"
        )
    if _asked.was_on and not is_attached(module):
        say(
            "> native communication in a second model: it is not the one that is in low bits, and "
            "load_checkpoint has not loaded it"
        )
    loaded(list(_guards))


@functools.cache
def _is_row_parallel(kind: Any) -> bool:
    return any("RowParallel" in base.__name__ for base in kind.__mro__)
