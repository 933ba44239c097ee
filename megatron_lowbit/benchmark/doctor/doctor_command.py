r"""Tell whether low bits pay on this machine, and which flags to use.

Start it with as many ranks as you will serve with. It measures what joins them, checks that low-bit
sums have the right bits here, times native and low bits over the messages of decoding and prefill,
and says which is faster, what a token then waits for communication, and which flags to use. With
--load it does so for that checkpoint: each sync point with its own bits, and what stays native and
why. It then writes the times as a tuning file for --lowbit-tuning. Without --load it looks at the
links alone, with messages of 4096 features, in 4 bits and in 2.

examples:
  torchrun --nproc-per-node 4 -m megatron_lowbit doctor
  torchrun --nproc-per-node 4 -m megatron_lowbit doctor --load CKPT
  torchrun --nproc-per-node 4 -m megatron_lowbit doctor --load CKPT --output tuning.json

With --load every other argument goes to Megatron. The tensor-parallel size is the number of ranks.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_lowbit import cli
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import check_output

_TUNING = "lowbit-tuning.json"


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and Megatron's."""
    parser = cli.described(__doc__)
    parser.add_argument(
        "--load",
        metavar="CKPT",
        help="a Megatron checkpoint with its calibration index in CKPT/lowbit",
    )
    parser.add_argument(
        "--seconds",
        type=cli.positive_number,
        default=120.0,
        metavar="S",
        help="for all times; the longest messages are left out if it is too little (default: 120)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the tuning file (default with --load: {_TUNING})",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="hold the advice against sweeps, behind emulated links of three rates and on "
        "loopback, without torchrun (as root, with iproute2; 40 minutes)",
    )
    options, others = parser.parse_known_args(argv)
    if others and options.load is None:
        parser.error(f"unrecognized arguments: {' '.join(others)} (Megatron's need --load)")
    return options, others


def main(argv: Sequence[str]) -> None:
    """Examine this group of ranks, and a model if there is one."""
    options, others = parse(argv)
    if options.check:
        _check(options.seconds)
        return
    ranks = _ranks()
    from megatron_lowbit.benchmark.doctor import doctor_run

    if options.load is None:
        if options.output is not None:
            raise LowbitError("--output: a tuning file has the codecs of a model: give --load, too")
        doctor_run.links_alone(options.seconds)
        return
    output = options.output or Path(_TUNING)
    check_output(output)
    doctor_run.with_model(options.load, others, output, ranks=ranks, seconds=options.seconds)


def _check(seconds: float) -> None:
    if "WORLD_SIZE" in os.environ:
        raise LowbitError("--check starts its own ranks: leave torchrun out")
    from megatron_lowbit.benchmark.doctor import doctor_trial

    doctor_trial.run(seconds)


def _ranks() -> int:
    """How many torchrun has started."""
    from megatron_lowbit.integration.runtime.rendezvous import check_environment

    check_environment()
    how = "torchrun --nproc-per-node N -m megatron_lowbit doctor"
    if "WORLD_SIZE" not in os.environ:
        raise LowbitError(f"no ranks to examine: start it with torchrun, as in {how}")
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks < 2:
        raise LowbitError(f"one rank sends nothing: start 2 or more, as in {how}")
    return ranks
