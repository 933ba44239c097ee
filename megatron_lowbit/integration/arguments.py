"""The argument group `--lowbit-tp-comm` for Megatron's argument parser, and what it switches on.

args = parse_args(extra_args_provider=add_lowbit_args)   # or among your own arguments
...                                                      # build the model, load the checkpoint
handle = apply_from_args(model, args)                    # None without the flag
"""

import argparse
from pathlib import Path

import torch.distributed as dist
from torch import nn

from megatron_lowbit.calibration.index_files import read_manifest
from megatron_lowbit.codecs import CODECS, DEFAULT_CODEC, get_codec
from megatron_lowbit.comm.agreement import on_every_rank
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.apply import Handle, apply

_BESIDE_CHECKPOINT = ""
INDEX_NAME = "lowbit"


def add_lowbit_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group; the signature is that of Megatron's `extra_args_provider`."""
    group = parser.add_argument_group("low-bit tensor-parallel communication")
    group.add_argument(
        "--lowbit-tp-comm",
        nargs="?",
        const=_BESIDE_CHECKPOINT,
        metavar="INDEX_DIR",
        help="sum tensor-parallel partials in low bits, with the index in INDEX_DIR "
        f"(default: {INDEX_NAME}/ in the checkpoint directory of --load)",
    )
    # No argparse choices: a bad value would print Megatron's thousand lines of usage.
    group.add_argument(
        "--lowbit-codec",
        metavar="CODEC",
        help=f"one of {', '.join(CODECS)} (default: the index's own, usually {DEFAULT_CODEC})",
    )
    group.add_argument(
        "--lowbit-bits",
        type=int,
        metavar="BITS",
        help="bits of a quantized value (default: the index's own)",
    )
    return parser


def index_dir_from_args(args: argparse.Namespace) -> Path | None:
    """The index directory that the arguments name, or None without `--lowbit-tp-comm`.

    Raises:
        LowbitError: Low-bit arguments without the flag, an unknown codec or number of bits, no
            checkpoint to look beside, no index there or one with a bad manifest.
    """
    if args.lowbit_tp_comm is None:
        for name in ("lowbit_codec", "lowbit_bits"):
            if getattr(args, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise LowbitError(f"{flag} does nothing without --lowbit-tp-comm: add it")
        return None
    if args.lowbit_codec is not None:
        get_codec(args.lowbit_codec, bits=args.lowbit_bits)
    if args.lowbit_tp_comm == _BESIDE_CHECKPOINT and not getattr(args, "load", None):
        raise LowbitError("--lowbit-tp-comm needs an INDEX_DIR, or --load to find one beside")
    directory = Path(args.lowbit_tp_comm or Path(args.load) / INDEX_NAME)
    calibrated = read_manifest(directory)["codec"]["name"]
    get_codec(args.lowbit_codec or calibrated, bits=args.lowbit_bits)
    return directory


def apply_from_args(model: nn.Module, args: argparse.Namespace) -> Handle | None:
    """Switch `model` to the low-bit path if the arguments say so, and say it in one line.

    Call it after the checkpoint is loaded.

    Raises:
        LowbitError: See `index_dir_from_args` and `apply`.
    """
    directory = on_every_rank(lambda: index_dir_from_args(args))
    if directory is None:
        return None
    handle = apply(model, directory, codec=args.lowbit_codec, bits=args.lowbit_bits)
    if dist.get_rank() == 0:
        print(f"> {handle}", flush=True)
    return handle
