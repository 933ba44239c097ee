"""What job launchers leave in the environment, and the wait for other ranks."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.runtime.rendezvous import check_environment

FOUR = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
WAIT = """
import os
from megatron_lowbit import cli

def main():
    import torch
    from megatron_lowbit.integration.runtime.rendezvous import muster
    muster()
    with open("/proc/net/tcp") as v4, open("/proc/net/tcp6") as v6:
        port = f":{int(os.environ['MASTER_PORT']):04X}"
        lines = [line.split() for line in [*v4, *v6]]
        listening = {line[1] for line in lines if line[3] == "0A" and line[1].endswith(port)}
    torch.distributed.init_process_group("gloo")  # from the environment, as Megatron does
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    print(total.item(), *listening)

cli.run(main)
"""


@pytest.fixture
def environment(monkeypatch, variables):
    """The variables of a launcher, and no others."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "MASTER_", "LOCAL_")) or name in FOUR:
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"MASTER_ADDR": "node1"},
            "MASTER_ADDR=node1 without RANK, WORLD_SIZE, MASTER_PORT: start",
        ),
        ({"RANK": "0"}, "RANK=0 without WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "3"}, "WORLD_SIZE=3 without RANK, MASTER_ADDR, MASTER_PORT"),
        ({**FOUR, "MASTER_PORT": ""}, "MASTER_PORT='' is no whole number"),
        ({**FOUR, "MASTER_ADDR": ""}, "MASTER_PORT=29500 without MASTER_ADDR: start the ranks"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0, WORLD_SIZE=2 without MASTER_ADDR, MASTER_PORT"),
        ({**FOUR, "RANK": "2"}, "RANK=2 with WORLD_SIZE=2: ranks count from 0 to 1"),
        ({**FOUR, "RANK": "-1"}, "RANK='-1' is no whole number: start the ranks with torchrun"),
        ({**FOUR, "RANK": "two"}, "RANK='two' is no whole number"),
        ({**FOUR, "RANK": "²"}, "RANK='²' is no whole number"),
        ({**FOUR, "WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0' is no whole number"),
        ({**FOUR, "WORLD_SIZE": "0"}, "WORLD_SIZE=0: give the number of ranks"),
        ({**FOUR, "WORLD_SIZE": "9" * 500}, "WORLD_SIZE=9+: give the number of ranks"),
        ({**FOUR, "MASTER_PORT": "http"}, "MASTER_PORT='http' is no whole number"),
        ({**FOUR, "MASTER_PORT": "70000"}, "MASTER_PORT=70000: ports are from 1 to 65535"),
        ({**FOUR, "MASTER_PORT": "0"}, "MASTER_PORT=0: ports are from 1 to 65535"),
        ({**FOUR, "LOCAL_RANK": "x"}, "LOCAL_RANK='x' is no whole number"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "3"}, "srun has started 3 processes.*SLURM_NTASKS"),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "4"},
            "srun has started 4 processes .SLURM_STEP_NUM_TASKS. and none has a RANK: each would",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
            "mpirun has started 2 processes.*set RANK=.OMPI_COMM_WORLD_RANK",
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpirun has started 2 processes .PMI_SIZE."),
    ],
)
def test_an_environment_that_does_not_say_who_the_ranks_are(environment, message):
    with pytest.raises(LowbitError, match=message):
        check_environment()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        FOUR,
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {"SLURM_NTASKS": "4"},  # an allocation, in which nothing was started
        {**FOUR, "SLURM_PROCID": "1", "SLURM_NTASKS": "3"},
    ],
)
def test_an_environment_that_does(environment):
    check_environment()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(rank: int, port: int, *command: str, **more: str) -> subprocess.Popen:
    env = {**os.environ, **FOUR, "RANK": str(rank), "MASTER_PORT": str(port)}
    env |= {"WORLD_SIZE": "3", "GLOO_SOCKET_IFNAME": "lo", **more}
    return subprocess.Popen(
        [sys.executable, *(command or ("-c", WAIT))],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _end(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def _said(process: subprocess.Popen, text: str) -> None:
    line = process.stderr.readline()
    assert re.search(text, line), line


def test_a_wait_is_said_at_once_and_then_all_find_each_other():
    """The last rank comes late: the others say for whom they wait, and no stranger can connect."""
    port = _free_port()
    second = _rank(1, port)
    _said(second, f"^> waiting for rank 0 at localhost:{port}, as rank 1; Ctrl-C ends it$")
    first = _rank(0, port)
    _said(first, f"^> waiting for 1 of 3 ranks at localhost:{port}: 2; Ctrl-C ends it$")
    ended = [_end(process) for process in (_rank(2, port), first, second)]
    assert [(status, out.split()[0]) for status, out, _ in ended] == [(0, "3.0")] * 3, ended
    assert ended[1][1].split()[1:] == [f"0100007F:{port:04X}"], "listens on the loopback alone"


FOR_TWO = "^> waiting for 2 of 3 ranks.*: 1, 2; Ctrl-C ends it$"
SWEEP = ("-m", "megatron_lowbit", "bench-all-reduce", "--sizes", "4K")


@pytest.mark.parametrize(
    ("rank", "command", "name", "wait"),
    [
        (0, (), "-c", FOR_TWO),
        (1, (), "-c", "rank 0 at localhost"),
        (0, SWEEP, "python -m megatron_lowbit bench-all-reduce", FOR_TWO),
    ],
)
def test_ctrl_c_ends_a_wait(rank, command, name, wait):
    process = _rank(rank, _free_port(), *command)
    _said(process, wait)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert _end(process)[::2] == (130, f"{name}: [rank {rank}] interrupted\n")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "MASTER_PORT={port}: rank 0 cannot listen there .Address already in use.: choose a"),
        ({"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR=no.such.host.invalid: no such host"),
        ({"MASTER_ADDR": "192.0.2.1"}, "MASTER_ADDR=192.0.2.1: rank 0 listens on port"),
    ],
)
def test_what_keeps_rank_0_from_listening_is_one_line(variables, message):
    port = _free_port()
    with socket.socket() as taken:
        if not variables:
            taken.bind(("127.0.0.1", port))
            taken.listen()
        status, _, err = _end(_rank(0, port, **variables))
    assert status == 1
    assert re.search(f"^-c: .rank 0. error: {message.format(port=port)}", err), err
    assert len(err.splitlines()) == 1
