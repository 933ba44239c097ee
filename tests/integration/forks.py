"""Ranks without torchrun's seconds: each a fork of a process that has imported Megatron.

For workers and command lines of which other tests see that they run as users start them, each rank
an interpreter of its own: under torchrun a rank takes 7-9 s to import Megatron.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from releases import environment

# By the PYTHONPATH of their release: several files of tests go over all releases. 0.4 GB each.
_servers: dict[str, subprocess.Popen] = {}


def ask(
    argv: list,
    *,
    ranks: int | None = None,
    env: dict[str, str] | None = None,
    interrupt: str = "",
    timeout: float = 300,
) -> dict:
    """Run a command line in forked ranks, or for `ranks=None` in one process that is none.

    Returns:
        What each rank ended with: "status", "out", "err".
    """
    env = env or environment()
    server = _server(env)
    request = {"argv": [str(word) for word in argv], "ranks": ranks, "env": env}
    with tempfile.TemporaryDirectory() as directory:
        request |= {"interrupt": interrupt, "timeout": timeout, "directory": directory}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()
    if not answer:
        raise RuntimeError("fork_server.py ended: what it said is on stderr")
    return json.loads(answer)


def _server(env: dict[str, str]) -> subprocess.Popen:
    path = env["PYTHONPATH"]
    if path not in _servers:
        _servers[path] = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("fork_server.py")],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that close() reaches its ranks, and Ctrl-C does not
        )
    return _servers[path]


@atexit.register
def close() -> None:
    """End the servers, and their ranks."""
    while _servers:
        _, server = _servers.popitem()
        os.killpg(server.pid, signal.SIGKILL)
        server.communicate()


def forked(ranks: int | None, *command: str | Path, env=None, status=0, timeout: float = 300):
    """Run a script as `releases.torchrun` does, each rank a fork; what they say comes by rank."""
    ended = ask(list(command), ranks=ranks, env=env, timeout=timeout)
    found = next((status for status in ended["status"] if status), 0)
    out, err = ("".join(ended[kind]) for kind in ("out", "err"))
    assert found == status, out[-2000:] + err[-4000:]
    return subprocess.CompletedProcess(command, found, out, err)
