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
from typing import NamedTuple

from releases import ROOT


class Server(NamedTuple):
    """A running server: where it listens, what serve.sh has said so far, and how it is asked."""

    port: int
    said: str
    path: str
    method: str

    def ask(
        self, body: object, path: str = "", method: str = "", kind: str = "application/json"
    ) -> tuple[int, str]:
        """Status and answer; `body` as JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}{path or self.path}"
        head = {"Content-Type": kind}
        asked = urllib.request.Request(url, data, head, method=method or self.method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(asked, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@contextlib.contextmanager
def served(
    checkpoint: Path, prompt: str, *, path: str, method: str, **environment: str
) -> Iterator[Server]:
    """A running server. It must not end by itself."""
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
    yield Server(port, said, path, method)
    assert started.poll() is None, "the server has ended"
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=60)
