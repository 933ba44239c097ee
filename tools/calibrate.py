#!/usr/bin/env python3
"""Collect activation ranges of a Megatron checkpoint and write its low-bit index.

Run it under torchrun with as many ranks as inference will use for tensor parallelism; a multiple
of that shares the corpus among data-parallel groups. With --simulate-tp N one process makes the
partials of N ranks itself.

examples:
  torchrun --nproc-per-node 3 tools/calibrate.py --load CKPT --data TEXT.txt
  python tools/calibrate.py --simulate-tp 8 --load CKPT --data TEXT.txt

Every other argument goes to Megatron (e.g. --tensor-model-parallel-size, --bf16); the model's
shape, its tokenizer and the tensor-parallel size are read from the checkpoint.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs from a plain checkout

from megatron_lowbit import cli
from megatron_lowbit.codecs import CODECS, DEFAULT_CODEC, get_codec


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and Megatron's."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help='.txt, or .jsonl with {"text": ...} a line',
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="index directory (default: CKPT/lowbit)"
    )
    parser.add_argument(
        "--codec",
        default=DEFAULT_CODEC,
        metavar="CODEC",
        help=f"codec that the index is for: {', '.join(CODECS)} (default: {DEFAULT_CODEC})",
    )
    parser.add_argument(
        "--bf16-features",
        metavar="K",
        help="features that travel in BF16: a count (12), or a fraction of the hidden size (0.01) "
        "(default: hidden/64 for static-hybrid, hidden/128 for rotated-hybrid)",
    )
    parser.add_argument(
        "--sequences", type=cli.positive, default=256, metavar="N", help="default: 256"
    )
    parser.add_argument(
        "--seq-length", type=cli.positive, default=512, metavar="TOKENS", help="default: 512"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the choice of sequences")
    parser.add_argument(
        "--resume", action="store_true", help="go on where an interrupted calibration was"
    )
    cli.add_simulate_tp(parser)
    return parser.parse_known_args()


def main() -> None:
    """Calibrate and write the index."""
    options, megatron_argv = parse()
    codec = get_codec(options.codec)
    from megatron_lowbit.integration import calibrate

    calibrate.run(options, codec, ["--load", options.load, *megatron_argv])


if __name__ == "__main__":
    cli.run(main)
