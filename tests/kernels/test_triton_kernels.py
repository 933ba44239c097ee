"""Runs `triton_cases` where Triton can: in its interpreter, and on a GPU if there is one.

In processes of their own, since whether kernels are interpreted is decided when Triton is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")
ROOT = CASES.parents[2]


def _run(*command: str, **environment: str) -> str:
    """What a Python process says, once it has ended well."""
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    env = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def _run_cases(**environment: str) -> str:
    options = ("-c", "tests/pytest.ini", "--rootdir=.", "-q", "-p", "no:cacheprovider")
    return _run("-m", "pytest", *options, str(CASES), **environment)


def test_in_the_interpreter():
    assert " passed" in _run_cases(TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_on_a_gpu():
    assert " passed" in _run_cases(TRITON_INTERPRET="0")
