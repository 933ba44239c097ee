"""One process per rank, as torchrun would start them, under one supervisor that leaves none behind.

`plain_ranks(ranks)` starts them on this machine's loopback interface; `links.emulated_links` starts
the same processes behind links of a chosen rate.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from megatron_lowbit.errors import LowbitError

MOST_RANKS = 254  # the addresses of one /24
# Seconds: what the others have, after one rank failed, to say their own line, and once more between
# SIGTERM and SIGKILL.
_GRACE = 3.0
_POLL = 0.05
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ranks:
    """Starts one process per rank; here as ordinary processes that meet on loopback."""

    def __init__(self, ranks: int) -> None:
        if not 1 <= ranks <= MOST_RANKS:
            raise LowbitError(f"{ranks} is no number of ranks: take 1 to {MOST_RANKS}")
        self.ranks = ranks

    def run(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        """Start ``argv`` once per rank, with torchrun's variables set, and wait for all of them.

        Rank 0's stdout passes through, and every rank's stderr. When one rank fails, the others are
        ended after a grace of 3 s; on Ctrl-C and SIGTERM all are ended at once.

        Args:
            argv: the command, such as ``[sys.executable, "script.py"]``.
            env: variables to set on top of this process's own.

        Raises:
            LowbitError: a rank exited non-zero or was killed; names the first one seen.
        """
        shared = {**os.environ, **self._meeting(), **(env or {})}
        started: list[subprocess.Popen] = []
        try:
            for rank in range(self.ranks):
                started.append(self._start(rank, argv, shared))
            failed = _wait(started)
        finally:
            with undisturbed():
                _end(started)
        if failed is not None:
            ending = _describe(started[failed].returncode)
            raise LowbitError(f"rank {failed} of {self.ranks} {ending}: see its messages above")

    def _start(self, rank: int, argv: Sequence[str], shared: dict[str, str]) -> subprocess.Popen:
        own = {"RANK": rank, "LOCAL_RANK": rank}
        own |= {"WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks}
        return subprocess.Popen(
            [*self._prefix(rank), *argv],
            env=shared | {name: str(value) for name, value in own.items()},
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else subprocess.DEVNULL,
            # Ctrl-C then reaches this process alone, which ends each rank with all its children.
            start_new_session=True,
        )

    def _prefix(self, rank: int) -> list[str]:
        """What goes before a rank's command."""
        return []

    def _meeting(self) -> dict[str, str]:
        """Where the ranks find each other: the variables that are equal on all of them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return meeting("127.0.0.1", port, "lo")


@contextlib.contextmanager
def plain_ranks(ranks: int) -> Iterator[Ranks]:
    """Yield `ranks` that meet on this machine's loopback interface, as fast as it is."""
    with endings_unwind():
        yield Ranks(ranks)


def meeting(address: str, port: int, interface: str) -> dict[str, str]:
    """The variables by which ``init_process_group("gloo")`` finds rank 0 and its own interface."""
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": interface,
        "OMP_NUM_THREADS": "1",
        "no_proxy": "*",
        "NO_PROXY": "*",
    }


@contextlib.contextmanager
def endings_unwind() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise where nobody handles them, so that `finally` blocks run."""
    replaced = []
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, lambda number, _: sys.exit(128 + number))
                replaced.append(number)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Hold back Ctrl-C, SIGTERM and SIGHUP: a second one must not cut the cleaning short."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(processes: list[subprocess.Popen]) -> int | None:
    """Wait until all ended well, or one failed and the others had their grace; the failed rank."""
    failed, deadline = None, float("inf")
    while time.monotonic() < deadline:
        statuses = [process.poll() for process in processes]
        if failed is None and any(statuses):
            failed = next(rank for rank, status in enumerate(statuses) if status)
            deadline = time.monotonic() + _GRACE
        if None not in statuses:
            break
        time.sleep(_POLL)
    return failed


def _end(processes: list[subprocess.Popen]) -> None:
    """End what still runs, with its children: SIGTERM, then after a grace SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = [process for process in processes if process.poll() is None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        deadline = time.monotonic() + _GRACE
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))


def _describe(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"
