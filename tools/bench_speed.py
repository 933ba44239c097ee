#!/usr/bin/env python3
"""Measure the speeds that the project set itself, and print them as a table.

Ranks run on this machine's CPU with Gloo, behind links that tc shapes to a rate (needs root and
iproute2) or on loopback. Takes about half an hour on an idle machine; run nothing else meanwhile.
The checkpoint is the quickstart's (examples/quickstart.sh makes it).

example:
  python tools/bench_speed.py --output speed.json
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs from a plain checkout

from megatron_lowbit import cli
from megatron_lowbit.errors import LowbitError

ROOT = Path(__file__).resolve().parents[1]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--load",
        type=Path,
        metavar="CKPT",
        default=ROOT / "out/quickstart/ckpt",
        help="for the time to first token: a checkpoint for TP 3 with its index (default: the "
        "quickstart's)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        default=ROOT / "examples/data/persuasion.txt",
        help="where its prompt is from (default: examples/data/persuasion.txt)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="all measured rows as JSON")
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    options = parse()
    from megatron_lowbit.benchmark.collectives import sweep_report, targets
    from megatron_lowbit.files import check_output

    for path in (options.load / "lowbit" / "manifest.json", options.data):
        if not path.is_file():
            raise LowbitError(f"{path} is missing: run examples/quickstart.sh, or name another")
    if options.output is not None:
        check_output(options.output)
        check_output(sweep_report.meta_path(options.output))
    rows = targets.run(options.load, options.data)
    if options.output is not None:
        sweep_report.write(rows, options.output, {"command": sweep_report.command_line()})


if __name__ == "__main__":
    cli.run(main)
