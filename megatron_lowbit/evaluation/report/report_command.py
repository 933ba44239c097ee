"""Make one HTML page, and PNG plots beside it, from a calibration index and evaluations.

The page needs no other file and no network. The PNGs go into a folder named after it:
report.html, report_plots/. Evaluations are what python -m megatron_lowbit evaluate writes with
--output; several, such as one at TP 3 and one at TP 8, are shown side by side.

example:
  python -m megatron_lowbit report --index CKPT/lowbit --results a.json b.json --output report.html
"""

import argparse
import shlex
from pathlib import Path

from megatron_lowbit import cli


def parse(argv: list[str]) -> argparse.Namespace:
    """Our arguments."""
    parser = cli.described(__doc__)
    parser.add_argument(
        "--index",
        required=True,
        type=Path,
        metavar="DIR",
        help="the calibration index, such as CKPT/lowbit",
    )
    parser.add_argument(
        "--results", required=True, nargs="+", type=Path, metavar="FILE", help="evaluations, JSON"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="the page, an .html file"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Read, draw, write."""
    options = parse(argv)
    from megatron_lowbit.evaluation import report

    report.require()
    from megatron_lowbit.calibration.index_files import read_index
    from megatron_lowbit.evaluation.report.page import check_destination, write_report
    from megatron_lowbit.evaluation.report.results import read_results
    from megatron_lowbit.evaluation.report.sections import all_sections

    check_destination(options.output)
    files = read_results(options.results)
    index = read_index(options.index)
    command = shlex.join(["python", "-m", "megatron_lowbit", "report", *argv])
    sections = all_sections(index, files, command)
    models = ", ".join(dict.fromkeys(file.data.model for file in files))
    title = f"{models}: low-bit communication against native BF16"
    for path in write_report(title, sections, options.output):
        print(path)
