"""examples/serve.sh: Megatron's server in low bits, asked over HTTP, says what generate.py says."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
from forks import forked
from releases import ROOT

PROMPT = "the world"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_server_says_what_generate_py_says(calibrated):
    pytest.importorskip("flask_restful")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "LOWBIT_PYTHON": sys.executable, "CKPT": str(calibrated)}
    env["ARGS"] = "--norm-epsilon 3e-05"
    command = ["bash", ROOT / "examples" / "serve.sh", PROMPT]
    served = subprocess.run(
        command, env={**env, "PORT": str(port)}, capture_output=True, text=True, timeout=300
    )
    assert served.returncode == 0, served.stderr
    assert "> low-bit communication: 4 sync points use shaped-hybrid" in served.stdout
    flags = ["--load", calibrated, "--lowbit-tp-comm", "--lowbit-collective", "one-shot"]
    wanted = ["--bf16", "--prompts", PROMPT, "--num-tokens-to-generate", "16"]
    generated = forked(3, ROOT / "examples" / "generate.py", *flags, *wanted)
    assert generated.returncode == 0, generated.stderr
    _, _, text = generated.stdout.partition(f"{PROMPT}[")
    assert f"serve: {PROMPT}{text.rstrip().removesuffix(']')}" in served.stdout


def test_no_checkpoint_is_said(tmp_path):
    env = {**os.environ, "LOWBIT_PYTHON": sys.executable, "CKPT": str(tmp_path)}
    command = ["bash", ROOT / "examples" / "serve.sh"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert (
        done.stderr == f"serve: no index in {tmp_path}/lowbit: run examples/quickstart.sh first\n"
    )
