"""The two steps of a `megatron.training` script that low bits need.

Both ways into Megatron's scripts take exactly these, so that they do the same and may meet:
`python -m megatron_lowbit.launch SCRIPT` calls them from outside, the patch files under `patches/`
from inside Megatron-LM:

    add_arguments(parser)      # in megatron.training.arguments.add_megatron_arguments
    checkpoint_loaded(model)   # in megatron.training.checkpointing.load_checkpoint, at its end

Each does its work once. Where a patched tree runs under the launcher the second call finds that it
is done, and says so where a user should know. What was parsed and is not on by the end, or by the
first forward pass, is an error (`integration.wanted`).
"""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

import torch.distributed as dist
from torch import nn

from megatron_lowbit.comm.agreement import gather_values, on_every_rank
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration import wanted
from megatron_lowbit.integration.apply import Handle
from megatron_lowbit.integration.arguments import (
    add_lowbit_args,
    apply_from_args,
    completed,
    index_dir_from_args,
)
from megatron_lowbit.integration.stats import write_stats
from megatron_lowbit.integration.sums.sync_points import fingerprint, modules_of, transformer_layers
from megatron_lowbit.integration.wanted import FLAG


class _On(NamedTuple):
    """A model in low bits.

    Attributes:
        handle: What `apply` gave.
        stats: The file that --lowbit-stats names.
        layers: Its layers on this rank.
        fingerprints: Of the layers that the calibration index is for.
    """

    handle: Handle
    stats: Path | None
    layers: WeakSet[nn.Module]
    fingerprints: list[str]


_on: list[_On] = []


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group `--lowbit-tp-comm` to Megatron's parser, unless it is there.

    From then on the parser refuses wrong low-bit arguments when it parses, before Megatron starts
    or loads anything.

    Args:
        parser: Megatron's, before it has parsed.

    Returns:
        `parser` itself.
    """
    if FLAG in parser._option_string_actions:
        return parser
    add_lowbit_args(parser)
    parse = parser.parse_known_args

    def checked(args=None, namespace=None):
        """`parse_known_args`, which argparse's `parse_args` calls, too."""
        parsed, rest = parse(args, namespace)
        wanted.check_words(parser, list(sys.argv[1:] if args is None else args), rest)
        _check(parsed)
        wanted.note(parsed)
        return parsed, rest

    parser.parse_known_args = checked
    return parser


def checkpoint_loaded(model: nn.Module | Iterable[nn.Module]) -> Handle | None:
    """Switch a model to low bits as Megatron's global arguments say, and say it in one line.

    Call it on every rank, after the weights are loaded and before the first forward pass.

    Args:
        model: What `load_checkpoint` was given: a model, wrapped or not, or a list of its chunks.

    Returns:
        What `apply` gives, kept for the life of the process; None without `--lowbit-tp-comm`, or
        if the model is in low bits already: one line then says that this call was not needed.

    Raises:
        LowbitError: See `integration.apply.apply`; or the arguments have lost what was parsed, or
            other weights were loaded into a model that is in low bits.
    """
    from megatron.training import get_args

    args = completed(get_args())
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    modules = [module for _, module in modules_of(chunks)]
    if args.lowbit_tp_comm is None:
        if wanted.is_expected() and wanted.was_parsed():
            raise LowbitError(
                f"{FLAG} was given, but is missing from Megatron's arguments: something replaced "
                "them (--yaml-cfg?); set lowbit_tp_comm there"
            )
        if not wanted.is_expected():
            wanted.loaded(modules)
        return None
    layers = list(on_every_rank(lambda: transformer_layers(chunks)).values())
    prints = [fingerprint(layer) for layer in layers]
    # Asked of all ranks: a pipeline stage may have no layers, and all must do the same.
    states = gather_values(_state(layers, prints))
    if "other weights" in states:
        raise LowbitError(
            "a checkpoint with other weights was loaded after low bits were switched on, and the "
            "calibration index is for the first ones: load once, or call remove() first"
        )
    if "on" in states and "off" not in states:
        _say(
            "> low-bit communication is on already for this model, and was not switched on again: "
            "this Megatron is patched and the launcher runs it (one of them is enough), or its "
            "checkpoint was loaded twice"
        )
        return None
    on_every_rank(lambda: _check(args))
    handle = apply_from_args(chunks, args)
    assert handle is not None, "--lowbit-tp-comm is among the arguments"
    stats = Path(args.lowbit_stats).absolute() if args.lowbit_stats is not None else None
    _on.append(_On(handle, stats, WeakSet(layers), prints))
    wanted.met()
    wanted.loaded(modules)
    return handle


def _state(layers: list[nn.Module], prints: list[str]) -> str:
    """``on``, ``off`` or ``other weights`` of this rank's layers; ``none`` if it has none."""
    if not layers:
        return "none"
    for model in _on:
        if not model.handle.is_removed and all(layer in model.layers for layer in layers):
            return "on" if model.fingerprints == prints else "other weights"
    return "off"


def is_on() -> bool:
    """Whether `checkpoint_loaded` has switched a model to low bits that is in them still."""
    return any(not model.handle.is_removed for model in _on)


def write_stats_now() -> None:
    """Write the file of `--lowbit-stats`: for an end that skips exit handlers, which do it else."""
    for model in _on:
        if model.stats is not None and os.environ.get("RANK", "0") == "0":
            write_stats(model.handle.stats(), model.stats)


def _check(args: argparse.Namespace) -> None:
    """Raise LowbitError for low-bit arguments that a script of `megatron.training` cannot meet."""
    if index_dir_from_args(args) is not None and getattr(args, "load", None) is None:
        raise LowbitError(
            f"{FLAG} needs --load: a calibration index belongs to the weights of one checkpoint"
        )


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
