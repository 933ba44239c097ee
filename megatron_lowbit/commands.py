"""Every tool as a command of the installed package: ``python -m megatron_lowbit COMMAND ...``.

A command is a module with ``main(argv)``. It is imported when it runs, so that help comes at once;
the first line of its docstring is what the list of commands says of it. To add one, add a line to
`COMMANDS`. tools/*.py run the same from a checkout.
"""

import ast
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from megatron_lowbit import cli
from megatron_lowbit.errors import LowbitError

PROGRAM = "python -m megatron_lowbit"
# Command -> its module, under megatron_lowbit.
COMMANDS = {
    "convert": "integration.convert.convert_command",
    "calibrate": "integration.loops.calibrate_command",
    "evaluate": "integration.loops.evaluate_command",
    "report": "evaluation.report.report_command",
    "predict": "benchmark.prediction.predict_command",
    "patch": "integration.patching.patch_command",
    "bench-all-reduce": "benchmark.collectives.all_reduce_command",
    "bench-codecs": "benchmark.codecs.codecs_command",
    "bench-speed": "benchmark.collectives.speed_command",
    "bench-quality": "benchmark.quality.quality_command",
    "doctor": "benchmark.doctor.doctor_command",
    "gpu-check": "benchmark.gpu_check.gpu_check_command",
    "robustness": "benchmark.quality.robustness_command",
}
_USAGE = f"""\
usage: {PROGRAM} COMMAND ...
       torchrun --nproc-per-node N -m megatron_lowbit COMMAND ...

commands:
{{commands}}

{PROGRAM} COMMAND --help says more of one. A script of Megatron-LM's runs in low bits by
{PROGRAM}.launch SCRIPT ... --lowbit-tp-comm."""


def run(command: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command of `COMMANDS` and exit as `cli.run` says.

    Args:
        command: Its name.
        argv: Its arguments; those of this process if left out.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    cli.run(lambda: import_module(_module(command)).main(arguments))


def main() -> None:
    """Run the command that the command line names, or list all."""
    command, *argv = sys.argv[1:] or [""]
    if command in ("", "-h", "--help"):
        cli.say(usage())
        raise SystemExit(0 if command else 2)
    # What help, errors and Megatron's own parser call this program.
    sys.argv = [f"{PROGRAM} {command}" if command in COMMANDS else PROGRAM, *argv]
    run(command, argv)


def usage() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command:{width}}  {_summary(command)}" for command in COMMANDS]
    return _USAGE.format(commands="\n".join(lines))


def _module(command: str) -> str:
    """Of a command; raises LowbitError, with the near ones, if there is none of that name."""
    if command in COMMANDS:
        return f"megatron_lowbit.{COMMANDS[command]}"
    word = command.replace("_", "-")
    near = [name for name in COMMANDS if name.startswith(word)]
    near = near or difflib.get_close_matches(word, COMMANDS)
    meant = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(COMMANDS)}"
    raise LowbitError(f"unknown command {command!r}: {meant}")


def _summary(command: str) -> str:
    """The first line of a command's docstring, read and not imported."""
    path = Path(__file__).parent.joinpath(*COMMANDS[command].split(".")).with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text, f"{path} has no docstring"
    return text.splitlines()[0].rstrip(".")
