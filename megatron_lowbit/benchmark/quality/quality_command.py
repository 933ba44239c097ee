"""Measure the quality that the project set itself, and print it as tables.

In one process, in simulated tensor parallelism of 3 and 8 ranks: every codec, recipe, peer and
candidate on held-out prose, code and dialogue, and the five zero-shot tasks. It needs a checkout
for its texts, and the checkpoint is the quickstart's (examples/quickstart.sh makes it). An
interrupted run goes on where it was.

examples:
  python -m megatron_lowbit bench-quality --output out/quality
  python -m megatron_lowbit bench-quality --output out/feedback --feedback
"""

import argparse
from pathlib import Path

from megatron_lowbit import cli
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import ROOT, in_checkout


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = cli.described(__doc__)
    parser.add_argument(
        "--load",
        type=Path,
        metavar="CKPT",
        default=ROOT / "out/quickstart/ckpt",
        help="checkpoint (default: the quickstart's)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        required=True,
        help="calibration indexes, texts, results; a step whose result is there is not run again",
    )
    parser.add_argument(
        "--tokens",
        type=cli.positive,
        default=4096,
        metavar="N",
        help="of each text, rounded up to sequences of 512 (default: 4096)",
    )
    parser.add_argument(
        "--feedback", action="store_true", help="measure error feedback, and what it is to reach"
    )
    parser.add_argument(
        "--limit", type=cli.positive, default=200, metavar="N", help="items a task (default: 200)"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure and report."""
    options = parse(argv)
    in_checkout("examples/data")
    from megatron_lowbit.benchmark.quality import feedback, quality, quality_report

    if not options.load.is_dir():
        raise LowbitError(
            f"{options.load} is missing: name another, or run examples/quickstart.sh in a checkout"
        )
    settings = {"tokens": options.tokens, "limit": options.limit}
    steps, text = quality.steps, quality_report.text
    if options.feedback:
        steps, text = feedback.steps, feedback.text
    results = quality.run(options.load, options.output, steps(**settings), settings)
    cli.say(text(results))
