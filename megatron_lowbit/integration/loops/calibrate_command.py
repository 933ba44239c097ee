"""Collect statistics of a Megatron checkpoint's partials and write its calibration index.

Run it under torchrun with as many ranks as inference will use for tensor parallelism, times the
stages of --pipeline-model-parallel-size; a multiple of that shares the corpus among data-parallel
groups. With --simulate-tp N one process makes the partials of N ranks itself.

examples:
  torchrun --nproc-per-node 3 -m megatron_lowbit calibrate --load CKPT --data TEXT.txt
  python -m megatron_lowbit calibrate --simulate-tp 8 --load CKPT --data TEXT.txt --output lowbit-8

Every other argument goes to Megatron (e.g. --tensor-model-parallel-size, --bf16); the model's
shape, its tokenizer and the tensor-parallel size are read from the checkpoint.
"""

import argparse
from pathlib import Path

from megatron_lowbit import cli
from megatron_lowbit.errors import LowbitError


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and Megatron's."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add(
        "--data",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help='.txt, or .jsonl with {"text": ...} a line',
    )
    add("--output", type=Path, metavar="DIR", help="the calibration index (default: CKPT/lowbit)")
    add(
        "--codec",
        metavar="CODEC",
        help="codec that the calibration index is for: bf16, static-hybrid, scaled-hybrid, "
        "rotated-hybrid, shaped-hybrid, a peer's or an installed package's; an unknown name is "
        "answered with all (default: shaped-hybrid)",
    )
    add(
        "--bf16-features",
        metavar="K",
        help="features that travel in BF16: a count (12), or a fraction of the hidden size (0.01) "
        "(default: hidden/64 for static-hybrid and scaled-hybrid, hidden/128 for shaped-hybrid and "
        "rotated-hybrid)",
    )
    recipe = parser.add_mutually_exclusive_group()
    recipe.add_argument(
        "--budget",
        type=cli.positive_number,
        metavar="BITS",
        help="also choose bits and BF16 features for each sync point by measured sensitivity, so "
        "that a value takes so many bits on average, all included (e.g. 4.2)",
    )
    recipe.add_argument(
        "--target-loss",
        type=cli.positive_number,
        metavar="NATS",
        help="the same with the fewest bits that stay within so many nats a token (e.g. 0.02) of "
        "measured KL divergence from native communication",
    )
    add(
        "--skip",
        type=cli.positive,
        metavar="N",
        help="let N sync points of the recipe send nothing: the next one sends what they leave "
        "(fewer all-reduces, where latency is the cost)",
    )
    add("--sequences", type=cli.positive, default=256, metavar="N", help="default: 256")
    add("--seq-length", type=cli.positive, default=512, metavar="TOKENS", help="default: 512")
    add("--seed", type=int, default=1234, help="of the choice of sequences")
    add("--resume", action="store_true", help="go on where an interrupted calibration was")
    cli.add_simulate_tp(parser)
    options, megatron_argv = parser.parse_known_args(argv)
    planned = options.budget is not None or options.target_loss is not None
    if planned and (options.codec or options.bf16_features):
        raise LowbitError("a recipe chooses codec and BF16 features: leave out what sets them")
    if options.skip and not planned:
        raise LowbitError(f"--skip {options.skip} is for a recipe: add --budget or --target-loss")
    return options, megatron_argv


def main(argv: list[str]) -> None:
    """Calibrate and write the calibration index."""
    options, megatron_argv = parse(argv)
    from megatron_lowbit.codecs import CALIBRATED_CODEC, get_codec

    codec = get_codec(options.codec or CALIBRATED_CODEC)  # a typo is said before Megatron comes
    from megatron_lowbit.integration.loops import calibrate_checkpoint

    calibrate_checkpoint.run(options, codec, ["--load", options.load, *megatron_argv])
