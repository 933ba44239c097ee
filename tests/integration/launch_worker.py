"""Command lines of the launcher, each in a process of its own; run by test_launch.py.

Megatron is imported once (8 s); each command line runs in forked copies of this process, one for
each rank. CASES is JSON: a list of {"argv", "ranks", "env", "interrupt", "program"}: "interrupt" is
a piece of output after which rank 0 gets SIGINT, "program" a script to run without the launcher.
RESULTS gets a list of {"status", "out", "err"}, each a list with one entry a rank.
"""

import atexit
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from megatron_lowbit import cli, launch
from megatron_lowbit.integration import launcher, megatron_args
from megatron_lowbit.integration.cpu import enable_cpu

LIMIT = 120  # seconds for one command line


def preload():
    """Import what the script imports."""
    assert launcher
    enable_cpu()
    megatron_args.require_megatron_training()
    import megatron_script

    del sys.modules["megatron_script"], megatron_script


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run_rank(case: dict, rank: int, port: int, out: Path, err: Path) -> int:
    """Fork a rank; gives its process number."""
    process = os.fork()
    if process:
        return process
    leave = os._exit
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    status = 1
    try:
        if case["ranks"] > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(case["ranks"])}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            cli.RANK = rank
        os.environ |= case["env"]
        sys.argv = [case["program"] or "launch.py", *case["argv"]]
        if case["program"]:
            runpy.run_path(case["program"], run_name="__main__")
        else:
            cli.run(launch.main)
    except SystemExit as end:
        status = end.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    finally:  # as the interpreter ends
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        leave(status)


def run(case: dict, directory: Path) -> dict:
    """All ranks of a command line."""
    ranks, port = range(case["ranks"]), free_port()
    outs, errs = ([directory / f"{kind}{rank}" for rank in ranks] for kind in ("out", "err"))
    processes = [run_rank(case, r, port, outs[r], errs[r]) for r in ranks]
    deadline, status = time.monotonic() + LIMIT, [None] * len(processes)
    waiting_for = case["interrupt"]
    while None in status:
        if waiting_for and outs[0].exists() and waiting_for in outs[0].read_text():
            os.kill(processes[0], signal.SIGINT)
            waiting_for = None
        for rank, process in enumerate(processes):
            if status[rank] is not None:
                continue
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
            ended, code = os.waitpid(process, os.WNOHANG)
            if ended:
                status[rank] = os.waitstatus_to_exitcode(code)
        time.sleep(0.02)
    read = {"out": [p.read_text() for p in outs], "err": [p.read_text() for p in errs]}
    return {"status": status, **read}


def main(cases: Path, results: Path) -> None:
    preload()
    found = []
    for number, case in enumerate(json.loads(cases.read_text())):
        directory = results.parent / f"case{number}"
        directory.mkdir()
        found.append(run(case, directory))
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
