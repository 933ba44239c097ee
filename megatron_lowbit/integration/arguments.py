"""The argument group `--lowbit-tp-comm` for Megatron's argument parser, and what it switches on.

args = parse_args(extra_args_provider=add_lowbit_args)   # or among your own arguments
...                                                      # build the model, load the checkpoint
handle = apply_from_args(model, args)                    # None without the flag
"""

import argparse
from pathlib import Path

import torch.distributed as dist
from torch import nn

from megatron_lowbit.at_end import at_end
from megatron_lowbit.calibration.index_files import read_manifest
from megatron_lowbit.calibration.recipe import read_rules
from megatron_lowbit.codecs import CALIBRATED_CODEC, codec_names, get_codec
from megatron_lowbit.comm.agreement import gather_values, on_every_rank
from megatron_lowbit.comm.policy.policy import DEFAULT_MODE, MODES, Settings
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import check_writable
from megatron_lowbit.integration.apply import apply
from megatron_lowbit.integration.handle import Handle
from megatron_lowbit.integration.stats import write_stats

_BESIDE_CHECKPOINT = ""
_SWITCHES = ("lowbit_tp_comm", "lowbit_fold", "lowbit_no_feedback")
INDEX_NAME = "lowbit"


def add_lowbit_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group; the signature is that of Megatron's `extra_args_provider`."""
    group = parser.add_argument_group("low-bit tensor-parallel communication")
    group.add_argument(
        "--lowbit-tp-comm",
        nargs="?",
        const=_BESIDE_CHECKPOINT,
        metavar="INDEX_DIR",
        help="sum tensor-parallel partials in low bits, by the calibration index in INDEX_DIR "
        f"(default: {INDEX_NAME}/ in the checkpoint directory of --load)",
    )
    # No argparse choices: a bad value would print Megatron's thousand lines of usage.
    group.add_argument(
        "--lowbit-codec",
        metavar="CODEC",
        help=f"one of {', '.join(codec_names())} (default: by the recipe of the calibration index, "
        f"or the codec that it is for, usually {CALIBRATED_CODEC})",
    )
    group.add_argument(
        "--lowbit-bits",
        metavar="BITS[,BITS]",
        help="bits of a quantized value, or of a partial and of a sum, as in 4,6 (default: by the "
        "recipe of the calibration index, or its own for both)",
    )
    group.add_argument(
        "--lowbit-recipe",
        metavar="FILE",
        help="JSON list of rules for single sync points, the first that matches counts, such as "
        '[{"match": "30.mlp.*", "bits": 6}, {"match": "1.*", "codec": "native"}]',
    )
    group.add_argument(
        "--lowbit-collective",
        metavar="MODE",
        help=f"one of {', '.join(MODES)} (default: {DEFAULT_MODE}, low bits where they are "
        "surely faster; the others make a token's result independent of its batch)",
    )
    group.add_argument(
        "--lowbit-tuning",
        metavar="FILE",
        help="times that python -m megatron_lowbit doctor took here, for auto (default: times "
        "taken at load, in at most 5 s)",
    )
    group.add_argument(
        "--lowbit-node-size",
        metavar="RANKS",
        help="tensor-parallel ranks in a node, for hierarchical (default: from torchrun)",
    )
    group.add_argument(
        "--lowbit-inside-node",
        metavar="bf16|low-bit",
        help="what hierarchical sends inside a node (default: bf16)",
    )
    group.add_argument(
        "--lowbit-all-gather",
        metavar="BITS",
        help="with --sequence-parallel: also gather the inputs of column-parallel linears in so "
        "many bits (default: native BF16)",
    )
    group.add_argument(
        "--lowbit-fold",
        action="store_true",
        default=None,
        help="fold the rotations into the weights, for one-shot and two-shot: cheaper to encode, a "
        "little more error, the original weights kept in host memory",
    )
    group.add_argument(
        "--lowbit-no-feedback",
        action="store_true",
        default=None,
        help="do not carry what a sync point could not send to the next one",
    )
    group.add_argument(
        "--lowbit-experts",
        metavar="BITS",
        help="also sum routed experts' outputs in so many bits, where the token dispatcher sums "
        "them (default: native)",
    )
    group.add_argument(
        "--lowbit-stats",
        metavar="FILE",
        help="write calls, bytes, time and choices of rank 0 as JSON when the script ends",
    )
    return parser


def settings_from_args(args: argparse.Namespace) -> Settings:
    """What the arguments say about collectives.

    Raises:
        LowbitError: An unknown mode, or an argument that means nothing to it.
    """
    inside = args.lowbit_inside_node
    if inside not in (None, "bf16", "low-bit"):
        raise LowbitError(f"--lowbit-inside-node {inside}: choose bf16 or low-bit")
    return Settings(
        mode=args.lowbit_collective or DEFAULT_MODE,
        tuning=Path(args.lowbit_tuning) if args.lowbit_tuning else None,
        node_size=_number("--lowbit-node-size", args.lowbit_node_size),
        low_bit_inside=inside == "low-bit",
    )


def parse_bits(text: str | None) -> int | tuple[int, int] | None:
    """Bits of ``--lowbit-bits``: one number, or two with a comma; None stays None."""
    if text is None:
        return None
    numbers = [_positive("--lowbit-bits", part) for part in text.split(",")]
    if len(numbers) > 2:
        raise LowbitError(f"--lowbit-bits {text}: give one number, or two with a comma, as in 4,6")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def index_dir_from_args(args: argparse.Namespace) -> Path | None:
    """The index directory that the arguments name, or None without `--lowbit-tp-comm`.

    Raises:
        LowbitError: Low-bit arguments without the flag, one with a bad value, no checkpoint to look
            in, no calibration index there or one with a bad manifest.
    """
    args = completed(args)
    if args.lowbit_tp_comm is None:
        for name, value in vars(args).items():
            if name.startswith("lowbit_") and value is not None:
                flag = "--" + name.replace("_", "-")
                raise LowbitError(f"{flag} does nothing without --lowbit-tp-comm: add that, too")
        return None
    settings_from_args(args)
    bits = parse_bits(args.lowbit_bits)
    _bits_of("--lowbit-all-gather", args.lowbit_all_gather)
    _bits_of("--lowbit-experts", args.lowbit_experts)
    if args.lowbit_stats is not None:
        _check_stats(Path(args.lowbit_stats))
    _refuse_ignored(args)
    if args.lowbit_codec is not None:
        _check_codec(args.lowbit_codec, bits)
    if args.lowbit_recipe is not None:
        read_rules(Path(args.lowbit_recipe))
    if args.lowbit_tp_comm == _BESIDE_CHECKPOINT and not getattr(args, "load", None):
        raise LowbitError("--lowbit-tp-comm needs INDEX_DIR, or --load CKPT to take CKPT/lowbit")
    directory = Path(args.lowbit_tp_comm or Path(args.load) / INDEX_NAME)
    calibrated = read_manifest(directory)["codec"]["name"]
    _check_codec(args.lowbit_codec or calibrated, bits)
    return directory


def completed(args: argparse.Namespace) -> argparse.Namespace:
    """`args` with all low-bit arguments, None where one is missing, and each of its type.

    Arguments that come from elsewhere than our parser, such as Megatron's --yaml-cfg, may be some
    of them only, and numbers.

    Raises:
        LowbitError: One that does not exist, or is of a type that no command line gives.
    """
    names = vars(add_lowbit_args(argparse.ArgumentParser(add_help=False)).parse_args([]))
    given = {name: value for name, value in vars(args).items() if name.startswith("lowbit_")}
    unknown = sorted(given.keys() - names.keys())
    if unknown:
        raise LowbitError(f"{unknown[0]} is no low-bit argument: choose from {', '.join(names)}")
    typed = {name: _typed(name, given.get(name)) for name in names}
    return argparse.Namespace(**{**vars(args), **typed})


def _typed(name: str, value: object) -> object:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) and name in _SWITCHES:
        chosen = _BESIDE_CHECKPOINT if name == "lowbit_tp_comm" else True
        return chosen if value else None
    if isinstance(value, int | Path) and not isinstance(value, bool):
        return str(value)
    raise LowbitError(f"{name}: {value!r} is a {type(value).__name__}: give a text")


def _check_stats(path: Path) -> None:
    if path.is_dir():
        raise LowbitError(f"--lowbit-stats {path} is a directory: name a file")
    if path.exists() and not path.is_file():  # it would be replaced, /dev/null too
        raise LowbitError(f"--lowbit-stats {path} is no regular file: name one")
    check_writable(path.absolute().parent)


def _refuse_ignored(args: argparse.Namespace) -> None:
    """Raise LowbitError for an argument that the others leave without effect."""
    mode = args.lowbit_collective or DEFAULT_MODE
    if mode == "native":
        for name in ("codec", "bits", "recipe", "no-feedback"):
            if getattr(args, f"lowbit_{name}".replace("-", "_")) is not None:
                raise LowbitError(f"--lowbit-{name} means nothing to native: leave one of them out")
    if mode == "one-shot" and "," in (args.lowbit_bits or ""):
        raise LowbitError(f"--lowbit-bits {args.lowbit_bits}: one-shot sends no sums: give one")
    if args.lowbit_inside_node is not None and mode not in ("auto", "hierarchical"):
        raise LowbitError(f"--lowbit-inside-node means nothing to {mode}: leave it out")
    if args.lowbit_all_gather is not None and getattr(args, "sequence_parallel", None) is False:
        raise LowbitError(
            "--lowbit-all-gather means nothing without --sequence-parallel: add that, too"
        )


def _check_codec(name: str, bits: int | tuple[int, int] | None) -> None:
    """Raise LowbitError unless there is such a codec and the bits mean something to it."""
    codec = get_codec(name, bits=bits)
    if bits is not None and len(codec.supported_bits) == 1:
        raise LowbitError(f"{name} has a fixed number of bits: leave --lowbit-bits out")


def apply_from_args(model: nn.Module, args: argparse.Namespace) -> Handle | None:
    """Switch `model` to the low-bit path if the arguments say so, and say it in one line.

    Call it after the checkpoint is loaded.

    Raises:
        LowbitError: See `index_dir_from_args` and `apply`.
    """
    directory = on_every_rank(lambda: index_dir_from_args(args))
    if directory is None:
        return None
    args = completed(args)
    handle = apply(
        model,
        directory,
        codec=args.lowbit_codec,
        bits=parse_bits(args.lowbit_bits),
        collective=settings_from_args(args),
        all_gather_bits=_bits_of("--lowbit-all-gather", args.lowbit_all_gather),
        experts_bits=_bits_of("--lowbit-experts", args.lowbit_experts),
        recipe=args.lowbit_recipe,
        fold=bool(args.lowbit_fold),
        feedback=False if args.lowbit_no_feedback else None,
    )
    lines = dict(reversed(gather_values((handle.layers, str(handle)))))
    if dist.get_rank() == 0:
        for layers in sorted(lines):  # a line for each pipeline stage
            print(f"> {lines[layers]}", flush=True)
        if args.lowbit_stats is not None:
            path = Path(args.lowbit_stats).absolute()  # the script may change its directory
            at_end(lambda: write_stats(handle.stats(), path))
    return handle


def _bits_of(flag: str, text: str | None) -> int | None:
    """Bits of an option that goes by the default codec without calibration."""
    bits = _number(flag, text)
    if bits is not None:
        get_codec(bits=bits)
    return bits


def _number(flag: str, text: str | None) -> int | None:
    return None if text is None else _positive(flag, text)


def _positive(flag: str, text: str) -> int:
    if not text.strip().isdigit() or int(text) == 0:
        raise LowbitError(f"{flag} {text}: not a positive whole number")
    return int(text)
