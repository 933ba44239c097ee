"""Run a Megatron-LM script as it is, with low-bit tensor-parallel communication.

usage:
  python -m megatron_lowbit.launch SCRIPT ARGS... --lowbit-tp-comm [INDEX_DIR]
  torchrun --nproc-per-node 3 -m megatron_lowbit.launch SCRIPT ARGS... --lowbit-tp-comm
  python -m megatron_lowbit.launch -m MODULE ARGS... --lowbit-tp-comm

SCRIPT is any script that parses its arguments and loads its checkpoint by megatron.training, such
as Megatron-LM's examples/inference/gpt/gpt_static_inference.py or
tools/run_text_generation_server.py. ARGS are the script's own. --lowbit-tp-comm and the arguments
that go with it are in its --help, are checked when it parses them, and take effect when it has
loaded its checkpoint: one line then says how many sync points are in low bits. Without INDEX_DIR
CKPT/lowbit is taken, where CKPT is the checkpoint of --load; python -m megatron_lowbit calibrate
makes it.
What counts is what Megatron parses: a script may build its argument list itself, as evaluation
harnesses do, and then it belongs there.

A script that lies in a Megatron-LM checkout uses that checkout's megatron. For other scripts
MEGATRON_LM=DIR names one; without it the installed megatron is used.

Without CUDA the script runs on the CPU (Gloo); one line says which of its arguments that changes.

The exit status is the script's; it is 1, with one line that says why, if low bits were asked for
and could not be on, or what is written at the end cannot be, and 130 after Ctrl-C.
"""

import importlib.util
import runpy
import sys
import traceback
from pathlib import Path

from megatron_lowbit import cli
from megatron_lowbit.errors import LowbitError


def main() -> None:
    """Find the script, step into Megatron, run it, and see that low bits were on."""
    is_module, name, argv = _target(sys.argv[1:])
    # Later than cli.run, so that an error of these imports is one line, too.
    from megatron_lowbit.integration.runtime.launcher import Launch, use_checkout
    from megatron_lowbit.integration.runtime.rendezvous import check_environment, muster

    path = None if is_module else Path(name)
    if path is not None and not path.is_file():
        raise LowbitError(f"{name}: no such script")
    check_environment()
    use_checkout(path)
    sys.argv = [name, *argv]
    # What Python itself puts first: the script's directory, or for a module the working directory.
    sys.path.insert(0, str(Path.cwd() if path is None else path.resolve().parent))
    if is_module and not _exists(name):
        raise LowbitError(f"-m {name}: no such module")
    launch = Launch(name, argv)
    launch.install()
    muster()
    try:
        _run(name, is_module=is_module)
    except (KeyboardInterrupt, RuntimeError):  # the latter where another rank stopped first
        launch.stopped()
        raise
    launch.ended()


def _run(name: str, *, is_module: bool) -> None:
    """Run the script as Python would; its own errors keep their traceback."""
    try:
        if is_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    except (OSError, ImportError):  # cli.run would take them for the launcher's own
        traceback.print_exc()
        raise SystemExit(1) from None


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that it would be in
        return False


def _target(argv: list[str]) -> tuple[bool, str, list[str]]:
    """Whether it is a module, the script or module, and its arguments."""
    if not argv or argv[0] in ("-h", "--help"):
        cli.say(__doc__)
        raise SystemExit(0 if argv else 2)
    is_module = argv[0] == "-m"
    rest = argv[1:] if is_module else argv
    if not rest or rest[0].startswith("-"):
        raise LowbitError(f"{' '.join(argv)}: name a script, or -m and a module, before arguments")
    return is_module, rest[0], rest[1:]


if __name__ == "__main__":
    cli.run(main)
