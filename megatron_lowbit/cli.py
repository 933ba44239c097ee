"""What the command lines share: one-line errors, exit statuses, progress bars on one rank."""

import argparse
import atexit
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NoReturn

from megatron_lowbit.at_end import do_steps
from megatron_lowbit.errors import LowbitError


def _number(name: str, default: int) -> int:
    """A number that a job launcher sets; `runtime.rendezvous` refuses what is none."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


RANK = _number("RANK", 0)
# torchrun ends the other ranks 0.1 s after the first one fails: time for each to say its own line.
_GRACE = 1.0


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command line's `main` and `at_end`, and exit: 0, 1 on a user's error, 130 on Ctrl-C.

    User errors (`LowbitError`, `OSError`, a package of an extra that is missing) are one line on
    stderr, on each rank that meets them, and so is the loss of another rank; anything else is a
    fault of ours and keeps its traceback. SIGTERM, which torchrun sends to the other ranks when one
    fails, ends like Ctrl-C: temporary files are removed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    name = Path(sys.argv[0]).name
    where = f"{name}: [rank {RANK}] " if "RANK" in os.environ else f"{name}: "
    try:
        main()
        do_steps()
        _leave_ranks()
    except (LowbitError, OSError) as error:
        _exit(1, f"{where}error: {error}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("megatron_lowbit"):
            raise
        extras = 'pip install "megatron_lowbit[megatron,calibrate]"'
        _exit(1, f"{where}error: the package {error.name} is missing: {extras}")
    except RuntimeError as error:
        if not _is_lost_rank(error):
            raise
        _exit(1, f"{where}error: stopped, since another rank is gone")
    except KeyboardInterrupt:
        _exit(130, f"{where}interrupted", grace=0)
    sys.exit(0)


def _leave_ranks() -> None:
    """End here, after the exit handlers, if there is a group of Gloo's.

    Its threads may still hold a tensor of the last collective. To let go of it in an interpreter
    that is being torn down ends a process by SIGABRT, after all its work (torch 2.13, seen once in
    CI). To destroy the group helps only while nobody else, such as Megatron, refers to it.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_backend() == "gloo":
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed since its peer ended: Gloo's, NCCL's and the store's own words.

    Gloo's errors name the file of its transport that met them, whatever it was that the peer's end
    looked like there; torch's own are of classes such as DistNetworkError.
    """
    lost = r"gloo/(transport|rendezvous)|connection (was )?(closed|reset|refused)|peer closed"
    lost += r"|broken pipe|remote process exited|timed out|got 0 bytes"
    named = type(error).__name__ in ("DistNetworkError", "DistStoreError")
    return named or bool(re.search(lost, str(error), re.IGNORECASE))


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with ``--load``, for tools that leave the arguments they do not know to Megatron."""
    made = described(description)
    made.add_argument("--load", required=True, metavar="CKPT", help="Megatron checkpoint")
    return made


def described(description: str | None) -> argparse.ArgumentParser:
    """A parser that prints `description` as it stands, and takes no abbreviations."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_simulate_tp(parser: argparse.ArgumentParser) -> None:
    """Add ``--simulate-tp``."""
    parser.add_argument(
        "--simulate-tp",
        type=positive,
        metavar="N",
        help="simulate N tensor-parallel ranks in one process: everything but the communication is "
        "real",
    )


def progress(description: str, unit: str) -> Callable[[Iterable], Iterable]:
    """A function that wraps an iterable in a progress bar, on rank 0 only.

    A log, which keeps every state of the bar, gets one in 10 s.
    """
    from tqdm import tqdm

    wait = 0.1 if sys.stderr.isatty() else 10.0
    options = {"disable": RANK != 0, "dynamic_ncols": True, "mininterval": wait}
    return partial(tqdm, desc=description, unit=unit, **options)


def say(text: str) -> None:
    """Print on rank 0."""
    if RANK == 0:
        print(text, flush=True)


def positive(text: str) -> int:
    """argparse type: a whole number above zero."""
    return int(_above_zero(text, int, "a whole number above zero"))


def positive_number(text: str) -> float:
    """argparse type: a finite number above zero."""
    return _above_zero(text, float, "a finite number above zero")


def _above_zero(text: str, kind: Callable[[str], float], wanted: str) -> float:
    try:
        value = kind(text)
    except ValueError:  # argparse would show this function's name
        value = 0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def _exit(status: int, message: str, *, grace: float = _GRACE) -> NoReturn:
    """Leave without exit handlers: a rank waiting there for others would hang them and itself."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one would print a traceback
        signal.signal(number, signal.SIG_IGN)
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if _number("WORLD_SIZE", 1) > 1:
        time.sleep(grace)
    os._exit(status)
