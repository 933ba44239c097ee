"""examples/serve.sh as a server that tests may ask."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from releases import ROOT


@contextlib.contextmanager
def served(checkpoint: Path, prompt: str, **environment: str) -> Iterator[tuple[int, str]]:
    """A running server: its port, and what serve.sh has said so far. It must not end by itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "LOWBIT_PYTHON": sys.executable, "CKPT": str(checkpoint), "KEEP": "1"}
    env |= {"ARGS": "--norm-epsilon 3e-05", "PORT": str(port), **environment}
    started = subprocess.Popen(
        ["bash", ROOT / "examples" / "serve.sh", prompt],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    said = ""
    for line in started.stdout:
        said += line
        if "the server stays up" in line:
            break
    yield port, said
    assert started.poll() is None, "the server has ended"
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=60)


def ask(
    port: int, body: object, *, path: str, method: str, kind: str = "application/json"
) -> tuple[int, str]:
    """Status and answer; `body` as JSON, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"http://127.0.0.1:{port}{path}"
    asked = urllib.request.Request(url, data, {"Content-Type": kind}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
