"""One tiny checkpoint and one index of it, for all tests of command lines."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from releases import RELEASES, ROOT, torchrun


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A converted checkpoint for TP 3, without an index."""
    pytest.importorskip("transformers")
    from tiny_llama import hugging_face_model

    directory = tmp_path_factory.mktemp("tools")
    hugging_face_model(directory / "hf", tie_word_embeddings=True)
    command = [sys.executable, ROOT / "tools" / "convert_hf.py", "--model", directory / "hf"]
    command += ["--save", directory / "ckpt", "--tensor-model-parallel-size", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"--load {directory / 'ckpt'}" in done.stdout
    return directory / "ckpt"


@pytest.fixture(scope="session")
def calibrated(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint with an index beside it."""
    target = tmp_path_factory.mktemp("calibrated") / "ckpt"
    shutil.copytree(checkpoint, target)
    text = ROOT / "examples" / "data" / "persuasion.txt"
    small = ["--sequences", "4", "--seq-length", "16"]
    tool = ROOT / "tools" / "calibrate.py"
    done = torchrun(3, tool, "--load", target, "--data", text, *small, "--budget", "4")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "4 sequences, for shaped-hybrid with 0 of 48 features" in done.stdout
    assert re.search(r"^recipe: (3\.\d\d|4\.00) bits a value on average", done.stdout, re.MULTILINE)
    return target


def pytest_itemcollected(item: pytest.Item) -> None:
    """Writes the cell of the support matrix that a test stands for into JUnit's report.

    Where a mark names no release it is the one among the test's parameters.
    """
    for mark in item.iter_markers("support"):
        capability, *named = mark.args
        (release,) = named or [p for p in item.callspec.params.values() if p in RELEASES]
        item.user_properties.append(("support", f"{capability} @ {release}"))
