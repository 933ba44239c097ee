"""Steps at the end of a run that can fail it.

Python's own exit handlers cannot: an error in one is a traceback, and the exit status stays 0. So
what a run owes its user at its end, such as the file of `--lowbit-stats`, is registered here. It is
done by whoever ends the run (`cli.run`, the launcher), else when the interpreter exits, where a
failure is one line and the exit status 1.
"""

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_lowbit.errors import LowbitError

_steps: list[Callable[[], None]] = []


def at_end(step: Callable[[], None]) -> None:
    """Have `step` done once, at the end of this run."""
    if not _steps:
        atexit.unregister(_exiting)
        atexit.register(_exiting)
    _steps.append(step)


def do_steps() -> None:
    """Do now what is registered, all of it, and nothing of it again.

    Raises:
        LowbitError: The first `LowbitError` or `OSError` of a step, as one line.
    """
    failures = []
    while _steps:
        try:
            _steps.pop(0)()
        except (LowbitError, OSError) as error:
            failures.append(error)
    if failures:
        raise LowbitError(str(failures[0]))


def _exiting() -> None:
    try:
        do_steps()
    except LowbitError as error:
        fail(error)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def fail(error: LowbitError) -> NoReturn:
    """End with the error's line and status 1, from where nothing but that helps."""
    rank = f" [rank {os.environ['RANK']}]" if "RANK" in os.environ else ""
    print(f"{Path(sys.argv[0]).name}:{rank} error: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
