r"""Measure low-bit all-reduces against the backend's own, from 8 KB to 64 MB.

Every result is checked first, bit for bit against the same sum in one process; then the calls are
timed. Prints the speedups and where they are below 1. Without torchrun it starts the ranks itself,
with Gloo on this machine's CPU, on loopback or behind emulated links; under torchrun it measures
the ranks that torchrun started, NCCL on GPUs.

examples:
  python -m megatron_lowbit bench-all-reduce --ranks 2,4 --link 1gbit --output results.json \
      --plot results.png
  python -m megatron_lowbit bench-all-reduce --ranks 4 --codecs rotated-hybrid \
      --write-tuning tuning.json
  torchrun --nproc-per-node 8 -m megatron_lowbit bench-all-reduce --output results.json

A message is [tokens, hidden]; one smaller than a token (in a reduce-scatter: a token a rank) has
fewer features, and a size is rounded down to whole tokens. Codecs without a kernel for the
device run in plain torch, so on a CPU their times say nothing of the peers' own systems.
"""

import argparse
from pathlib import Path

from megatron_lowbit import cli


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = cli.described(__doc__)
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--sizes",
        metavar="LIST",
        help="bytes of the message in BF16, with K, M or G (default: 8K,32K,128K,512K,2M,8M,64M)",
    )
    what.add_argument(
        "--hidden", type=cli.positive, default=4096, metavar="N", help="features (default: 4096)"
    )
    what.add_argument(
        "--codecs",
        metavar="LIST",
        help="these by every collective, also with bits as in rotated-hybrid-4+6 (default: ours, "
        "the paper's and the peers', each by its own collective)",
    )
    what.add_argument(
        "--collectives",
        metavar="LIST",
        help="only these: one-shot, two-shot, hierarchical, auto, reduce-scatter",
    )
    what.add_argument(
        "--node-size", type=cli.positive, metavar="L", help="ranks in a node, for hierarchical"
    )
    what.add_argument(
        "--tuning",
        type=Path,
        metavar="FILE",
        help="for auto (default: times taken before the sweep)",
    )
    what.add_argument(
        "--feedback", action="store_true", help="carry errors from call to call, as models do"
    )
    what.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="timed for each size and variant, at the least 7 calls (default: 1)",
    )
    where = parser.add_argument_group("between which ranks")
    where.add_argument(
        "--ranks",
        metavar="LIST",
        help="start so many, e.g. 2,4,8 (default: those that torchrun started, or 2)",
    )
    where.add_argument(
        "--link", metavar="RATE", help="e.g. 1gbit; needs root and iproute2 (default: loopback)"
    )
    out = parser.add_argument_group("results")
    out.add_argument("--output", type=Path, metavar="FILE", help="JSON, and FILE's .meta.json")
    out.add_argument("--plot", type=Path, metavar="FILE", help=".png, .svg or .pdf")
    out.add_argument(
        "--write-tuning",
        type=Path,
        metavar="FILE",
        help="a tuning file for auto on this machine and number of ranks, of --codecs (default: "
        "rotated-hybrid and shaped-hybrid), each with carries and without; times taken after the "
        "sweep",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure and report."""
    options = parse(argv)
    from megatron_lowbit.benchmark.collectives import sweep_run

    sweep_run.run(options)
