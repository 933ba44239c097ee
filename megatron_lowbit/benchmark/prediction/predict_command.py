"""Predict the time of tensor-parallel communication on hardware that is not here.

Without options: for each link, model (Llama 3 shapes) and tensor-parallel size the fastest
collective and its speedup over native BF16, in decode and prefill. --link, --model and --tp narrow
this and show the times. Figures of links and cards, with sources, and what is assumed:
megatron_lowbit/benchmark/prediction/hardware.py; formulas:
megatron_lowbit/benchmark/prediction/cost_model.py.

--check tests the formulas on this machine: behind emulated links of 100 Mbit/s and 1 Gbit/s they
must be within 25 % of the measured time wherever 10 ms or more are predicted (below, chance in who
gets a shared processor decides). It needs root and iproute2, and takes about two minutes.

examples:
  python -m megatron_lowbit predict
  python -m megatron_lowbit predict --link pcie-4 --model 70b --tp 8
  python -m megatron_lowbit predict --plot predicted.png --json predicted.json
  python -m megatron_lowbit predict --check
"""

import argparse
from pathlib import Path

from megatron_lowbit import cli


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, not yet checked."""
    parser = cli.described(__doc__)
    parser.add_argument("--link", metavar="NAME", help="one link, with times")
    parser.add_argument("--model", metavar="NAME", help="one of 8b, 70b, 405b, with times")
    parser.add_argument("--tp", type=cli.positive, metavar="RANKS", help="one size, with times")
    parser.add_argument(
        "--bits", default="4", metavar="BITS", help="of partial and sum, such as 4,6 (default: 4)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw where which collective is fastest"
    )
    parser.add_argument(
        "--check", action="store_true", help="test the formulas behind emulated links instead"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Predict and report."""
    options = parse(argv)
    from megatron_lowbit.benchmark.prediction import prediction_run

    prediction_run.run(options)
