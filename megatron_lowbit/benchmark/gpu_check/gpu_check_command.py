r"""Check and time the GPU kernels on this machine, within minutes.

Runs stages in order of worth: every kernel against plain torch bit for bit, the figures of the
kernels page, CUDA graphs, symmetric memory with several ranks on this GPU, settings, a model's own
partials. Each has processes and a time limit of its own, so that one that fails leaves the others
alive. Writes OUT_DIR/gpu_check.json after each stage, and OUT_DIR/gpu_check.log. It needs torch,
Triton and safetensors, neither Megatron nor an installation. --table then puts the results into
megatron_lowbit/kernels/README.md.

examples:
  tools/gpu_check.sh out/gpu
  tools/gpu_check.sh out/gpu --minutes 12
  tools/gpu_check.sh --table out/gpu/gpu_check.json
  tools/gpu_check.sh --save-partials out/quickstart/ckpt    # with Megatron, before: the last stage
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_lowbit import cli
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import check_output, in_checkout

_MINUTES = 8.0
_MOST_MINUTES = 600.0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with a line on stderr where it asks for nothing or for two things."""
    parser = cli.described(__doc__)
    parser.add_argument("output", nargs="?", type=Path, metavar="OUT_DIR", help="of the results")
    parser.add_argument(
        "--minutes",
        type=_minutes,
        metavar="M",
        help=f"for all stages together (default: {_MINUTES:g})",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="few and small shapes in Triton's interpreter, on a CPU",
    )
    parser.add_argument(
        "--table", type=Path, metavar="JSON", help="fill the page's tables from a gpu_check.json"
    )
    parser.add_argument(
        "--save-partials",
        type=Path,
        metavar="CKPT",
        help="save what 3 simulated ranks of a Megatron checkpoint sum at a few sync points, to "
        "out/gpu_partials.safetensors: where Megatron is, before the check",
    )
    options = parser.parse_args(argv)
    asked = [options.output, options.table, options.save_partials]
    if sum(one is not None for one in asked) != 1:
        parser.error("give one of OUT_DIR, --table JSON and --save-partials CKPT")
    if options.output is None and (options.rehearse or options.minutes is not None):
        parser.error("--minutes and --rehearse go with OUT_DIR")
    return options


def _minutes(text: str) -> float:
    value = cli.positive_number(text)
    if value > _MOST_MINUTES:
        raise argparse.ArgumentTypeError(f"{value:g} is more than {_MOST_MINUTES:g}")
    return value


def main(argv: Sequence[str]) -> None:
    """Check this machine, or put a check's results on the page, or save partials."""
    options = parse(argv)
    if options.table is not None:
        _table(options.table)
    elif options.save_partials is not None:
        from megatron_lowbit.benchmark.gpu_check import record_partials

        record_partials.run(options.save_partials)
    else:
        _check(options)


def _table(path: Path) -> None:
    from megatron_lowbit.benchmark.gpu_check import gpu_results, gpu_tables
    from megatron_lowbit.files import replace_together

    page = in_checkout("megatron_lowbit/kernels/README.md")
    text = gpu_tables.filled(page.read_text(encoding="utf-8"), gpu_results.read(path))
    replace_together({page: text.encode()})
    cli.say(f"{page}: filled from {path}")


def _check(options: argparse.Namespace) -> None:
    from megatron_lowbit.benchmark.gpu_check import gpu_results, stage_runner
    from megatron_lowbit.benchmark.gpu_check.gpu_stages import PARTIALS, STAGES

    output = options.output.absolute()
    for name in (gpu_results.NAME, stage_runner.LOG):
        check_output(output / name, "OUT_DIR")
    (output / stage_runner.LOG).unlink(missing_ok=True)
    minutes = options.minutes or _MINUTES
    content = gpu_results.new(STAGES, minutes=minutes, is_rehearsal=options.rehearse)
    device = "cpu" if options.rehearse else "cuda"
    setting = stage_runner.Setting(output, device, PARTIALS)
    stage_runner.run(content, STAGES, setting, seconds=60 * minutes, say=cli.say)
    where = output / gpu_results.NAME
    bad = gpu_results.not_passed(content)
    if bad:
        raise LowbitError(f"{', '.join(bad)}: see {where} and {stage_runner.LOG} beside it")
    cli.say(f"written: {where}")
