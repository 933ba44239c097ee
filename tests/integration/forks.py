"""Ranks without torchrun's seconds: each a fork of a process that has imported Megatron.

For workers and command lines of which other tests see that they run as users start them, each rank
an interpreter of its own: under torchrun a rank takes 7-9 s to import Megatron.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from releases import environment

SERVER = Path(__file__).with_name("fork_server.py")


class ForkServer:
    """A process of fork_server.py: one interpreter, one release of Megatron."""

    def __init__(self, env: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, SERVER],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that close() reaches its ranks, and Ctrl-C does not
        )

    def ask(self, request: dict) -> dict:
        """What each rank of a command line ended with: "status", "out", "err"."""
        with tempfile.TemporaryDirectory() as directory:
            line = json.dumps(request | {"directory": directory})
            try:
                print(line, file=self._process.stdin, flush=True)
                answer = self._process.stdout.readline()
            except BrokenPipeError:
                answer = ""
        if not answer:
            raise RuntimeError("fork_server.py ended: what it said is on stderr")
        return json.loads(answer)

    def close(self) -> None:
        """End it and its ranks."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


_servers: dict[str, ForkServer] = {}


def ask(
    argv: list,
    *,
    ranks: int | None = None,
    env: dict[str, str] | None = None,
    interrupt: str = "",
    timeout: float = 300,
) -> dict:
    """Run a command line in forked ranks, or for `ranks=None` in one process that is none.

    One server is kept, for the release (PYTHONPATH) of the last call: tests go release by release.
    """
    env = env or environment()
    path = env["PYTHONPATH"]
    if path not in _servers:
        close()
        _servers[path] = ForkServer(env)
    request = {"argv": [str(word) for word in argv], "ranks": ranks, "env": env}
    return _servers[path].ask(request | {"interrupt": interrupt, "timeout": timeout})


@atexit.register
def close() -> None:
    """End the server that is kept."""
    while _servers:
        _servers.popitem()[1].close()


def forked(ranks: int | None, *command: str | Path, env=None, timeout: float = 300):
    """Run a script as `releases.torchrun` does, each rank a fork; what they say comes by rank."""
    ended = ask(list(command), ranks=ranks, env=env, timeout=timeout)
    status = next((status for status in ended["status"] if status), 0)
    out, err = ("".join(ended[kind]) for kind in ("out", "err"))
    return subprocess.CompletedProcess(command, status, out, err)
