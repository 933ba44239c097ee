"""Finding the other ranks: what a job launcher has left in the environment, and the wait for them.

Megatron reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them. Some of them
without the others, or a launcher that sets none of them (srun, mpirun), would end in a traceback,
in a wait that nothing explains, or in as many runs of one rank as there are processes. So they are
checked first, and `muster` waits in Python, where Ctrl-C works, and says for whom.
"""

import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from ipaddress import ip_address

from torch.distributed import PrefixStore, TCPStore

from megatron_lowbit.errors import LowbitError

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# How many processes another launcher has started, and which of them this is.
_OTHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_RANK"),
}
_PATIENCE = timedelta(minutes=10)  # torch's own
_QUIET = 1.0  # seconds in which torchrun's ranks find each other
_BACKLOG = 2048  # torch's own
_MOST_RANKS = 1 << 20

_kept: list[TCPStore] = []  # rank 0's serves torch's own rendezvous, too, while it lives


def check_environment() -> None:
    """Raise LowbitError for variables of a job launcher that do not say who the ranks are."""
    numbers = {name: _number(name) for name in _NUMBERS if name in os.environ}
    if not numbers.keys() & {"RANK", "WORLD_SIZE"}:
        _refuse_other_launchers()
    missing = [name for name in _TORCHRUN if not os.environ.get(name)]
    present = [name for name in _TORCHRUN if name not in missing]
    ranks, rank = numbers.get("WORLD_SIZE", 1), numbers.get("RANK", 0)
    alone = ranks == 1 and present in (["RANK", "WORLD_SIZE"], ["WORLD_SIZE"])
    if missing and present and not alone:
        found = ", ".join(f"{name}={os.environ[name]}" for name in present)
        raise LowbitError(
            f"{found} without {', '.join(missing)}: start the ranks with torchrun, which sets all "
            f"four, or unset {' and '.join(present)} for a run of one process"
        )
    if not 1 <= ranks <= _MOST_RANKS:
        raise LowbitError(f"WORLD_SIZE={ranks}: give the number of ranks, at least 1")
    if rank >= ranks:
        raise LowbitError(f"RANK={rank} with WORLD_SIZE={ranks}: ranks count from 0 to {ranks - 1}")
    if "MASTER_PORT" in numbers and not 1 <= numbers["MASTER_PORT"] <= 65535:
        raise LowbitError(f"MASTER_PORT={numbers['MASTER_PORT']}: ports are from 1 to 65535")


def muster() -> None:
    """Wait until all ranks of the environment are here; after that torch finds them at once.

    A wait of more than a second is said on stderr: by rank 0 with the ranks that are missing, by
    the others with the address at which nobody answers. Without MASTER_ADDR there is nobody to wait
    for. A second call does nothing.

    Raises:
        LowbitError: See `check_environment`; or the port of rank 0 is taken, the address is not
            known or not rank 0's, or somebody did not come within ten minutes.
    """
    check_environment()
    if not os.environ.get("MASTER_ADDR") or _kept:
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # its agent listens
    if rank == 0 and not is_torchrun:
        store = _listen(host, port, ranks)
    else:
        what = "torchrun's store" if is_torchrun else "rank 0"
        _until(lambda: _answers(host, port), lambda: f"{what} at {host}:{port}, as rank {rank}")
        store = TCPStore(host, port, ranks, False, wait_for_workers=False)
    _kept.append(store)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    here = PrefixStore(f"megatron_lowbit/{attempt}", store)
    here.set(str(rank), "here")
    if rank == 0:
        _until_all(here, ranks, f"{host}:{port}")


def _listen(host: str, port: int, ranks: int) -> TCPStore:
    """Rank 0's store, which torch's own rendezvous in this process shares.

    torch would listen on all addresses: with a loopback MASTER_ADDR we do on that one.
    """
    family, address = _address(host)
    is_local = ip_address(address).is_loopback
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address if is_local else "", port))
        listener.listen(_BACKLOG)
    except OSError as error:
        raise LowbitError(
            f"MASTER_PORT={port}: rank 0 cannot listen there ({error.strerror}): choose a free port"
        ) from None
    if not _answers(host, port):
        raise LowbitError(
            f"MASTER_ADDR={host}: rank 0 listens on port {port} and is not reached there: give an "
            "address of the machine that rank 0 runs on"
        )
    return TCPStore(
        host,
        port,
        ranks,
        True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),  # the store's from now on
        use_libuv=False,
    )


def _until_all(here: PrefixStore, ranks: int, where: str) -> None:
    missing = list(range(1, ranks))

    def are_here() -> bool:
        missing[:] = [rank for rank in missing if not here.check([str(rank)])]
        return not missing

    def what() -> str:
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        return f"{len(missing)} of {ranks} ranks at {where}: {names}"

    _until(are_here, what)


def _until(is_so: Callable[[], bool], what: Callable[[], str]) -> None:
    start, said, pause = time.monotonic(), False, 0.005
    while not is_so():
        waited = time.monotonic() - start
        if waited > _PATIENCE.total_seconds():
            raise LowbitError(f"gave up after {_PATIENCE} of waiting for {what()}")
        if waited >= _QUIET and not said:
            said = True
            print(f"> waiting for {what()}; Ctrl-C ends it", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


def _answers(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection((_address(host)[1], port), timeout=2).close()
    except OSError:
        return False
    return True


def _address(host: str) -> tuple[socket.AddressFamily, str]:
    """Its first IPv4 address, or its first one."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LowbitError(f"MASTER_ADDR={host}: no such host ({error})") from None
    found.sort(key=lambda info: info[0] != socket.AF_INET)
    return found[0][0], str(found[0][4][0])


def _number(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal()):
        raise LowbitError(f"{name}={text!r} is no whole number: start the ranks with torchrun")
    return int(text[:20])


def _refuse_other_launchers() -> None:
    """Raise LowbitError for one of several processes that would each run alone."""
    for launcher, names in _OTHERS.items():
        sizes = [n for n in names if not n.endswith(("RANK", "PROCID"))]
        own = next((n for n in names if n not in sizes and os.environ.get(n)), None)
        size = next((n for n in sizes if os.environ.get(n)), None)
        if own and size and os.environ[size] != "1":
            raise LowbitError(
                f"{launcher} has started {os.environ[size]} processes ({size}) and none has a "
                f"RANK: each would run alone. Start torchrun by it, or set RANK=${own}, "
                f"WORLD_SIZE=${size}, MASTER_ADDR and MASTER_PORT"
            )
