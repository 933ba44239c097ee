"""Measure the speeds that the project set itself, and print them as a table.

Ranks run on this machine's CPU with Gloo, behind links that tc shapes to a rate (needs root and
iproute2) or on loopback. Takes 20 minutes or more on an idle machine; run nothing else meanwhile.
Checkpoint and text are those of a checkout, which examples/quickstart.sh makes, or any others.

example:
  python -m megatron_lowbit bench-speed --output speed.json
"""

import argparse
from pathlib import Path

from megatron_lowbit import cli
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import ROOT


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = cli.described(__doc__)
    parser.add_argument(
        "--load",
        type=Path,
        metavar="CKPT",
        default=ROOT / "out/quickstart/ckpt",
        help="for the times to first token and per token: a checkpoint for TP 3 with its "
        "calibration index (default: the quickstart's)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        default=ROOT / "examples/data/persuasion.txt",
        help="where the prompts are from (default: examples/data/persuasion.txt)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="all measured rows as JSON")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure and report."""
    options = parse(argv)
    from megatron_lowbit.benchmark.collectives import sweep_report, targets

    for path in (options.load / "lowbit" / "manifest.json", options.data):
        if not path.is_file():
            raise LowbitError(
                f"{path} is missing: name another, or run examples/quickstart.sh in a checkout"
            )
    sweep_report.check_paths(options.output)
    rows = targets.run(options.load, options.data)
    if options.output is not None:
        sweep_report.write(rows, options.output, {"command": sweep_report.command_line()})
