"""Measure the codecs alone: encode, decode_sum, both and reduce_encode, by kernels and plain torch.

Every result of a kernel is checked first, bit for bit against plain torch; then the calls are
timed. On a GPU the rotated codecs are measured twice, whatever MEGATRON_LOWBIT_ROTATION says: by
butterflies and, checked to be close, on tensor cores. Prints medians with p10 and p90, GB/s of the
bytes that must move, their share of a plain copy's bandwidth in the same run, and the speedup over
plain torch. fp8-g256 is what others send.

examples:
  python -m megatron_lowbit bench-codecs --output codecs.json
  python -m megatron_lowbit bench-codecs --shapes 1x8192,4096x8192 --codecs rotated-hybrid-4
"""

import argparse
import sys
from pathlib import Path

from megatron_lowbit import cli
from megatron_lowbit.errors import LowbitError


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = cli.described(__doc__)
    parser.add_argument(
        "--shapes",
        metavar="LIST",
        help="tokens x hidden, like 512x4096,1x8192 (default: on a GPU 1-16384 tokens of 576-12288 "
        "features, on a CPU 1, 64 and 512 of 4096)",
    )
    parser.add_argument(
        "--codecs",
        metavar="LIST",
        help="with bits as in rotated-hybrid-3 (default: rotated-hybrid at 4, 3 and 6 bits, "
        "static-hybrid, scaled-hybrid, fp8-g256)",
    )
    parser.add_argument(
        "--ranks", type=cli.positive, default=8, metavar="N", help="payloads of a sum (default: 8)"
    )
    parser.add_argument(
        "--seconds",
        type=cli.positive_number,
        default=0.3,
        metavar="S",
        help="timed for each case, at the least 7 calls (default: 0.3)",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: the GPU if there is one"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON, and FILE's .meta.json")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure and report."""
    options = parse(argv)
    import torch

    from megatron_lowbit.benchmark.codecs import codec_bench
    from megatron_lowbit.benchmark.collectives import sweep_report

    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise LowbitError("--device cuda: torch sees no GPU")
    sweep_report.check_paths(options.output)
    shapes = codec_bench.SHAPES[kind]
    plan = codec_bench.Plan(
        codecs=tuple(options.codecs.split(",")) if options.codecs else codec_bench.CODECS,
        shapes=codec_bench.parse_shapes(options.shapes) if options.shapes else shapes,
        ranks=options.ranks,
        seconds=options.seconds,
        device=torch.device(kind),
    )
    rows = codec_bench.run(plan, cli.say)
    cli.say("\n" + codec_bench.table(rows))
    if warning := sweep_report.unsteady(rows):
        cli.say(f"\n{warning}")
    if options.output is not None:
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        machine = codec_bench.machine(plan.device)
        meta = sweep_report.circumstances(
            sweep_report.command_line(), machine=machine, versions=versions
        )
        sweep_report.write(rows, options.output, meta)
        cli.say(f"\nwritten: {options.output}, {sweep_report.meta_path(options.output)}")
