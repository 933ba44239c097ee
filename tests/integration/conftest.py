"""What tests share: a tiny checkpoint and its index for command lines, a small model for ranks."""

import fcntl
import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import forks
import pytest
import torch
from on_ranks import _group_of_ranks, divert, pytest_runtest_logreport  # noqa: F401
from releases import NEWEST, RELEASES, ROOT, run, torchrun
from small_gpt import build, index_of, start_megatron, whole_logits

MADE = "LOWBIT_TEST_MADE"  # the directory of what is made once


def _once(name: str, make: Callable[[Path], Path]) -> Path:
    """What `make` makes in a directory, once for all workers of pytest-xdist and all ranks."""
    directory, made = (Path(os.environ[MADE], n) for n in (name, f"{name}.made"))
    with directory.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(directory, ignore_errors=True)  # of a worker that failed
            directory.mkdir()
            made.write_text(str(make(directory)))
        return Path(made.read_text())


@pytest.fixture(scope="session")
def once() -> Callable[[str, Callable[[Path], Path]], Path]:
    """For what a file's tests have in common, in ranks and elsewhere: see `_once`."""
    return _once


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """A converted checkpoint for TP 3, without an index."""
    pytest.importorskip("transformers")
    return _once("checkpoint", _convert)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A tied Llama in Hugging Face form: tests damage copies of it."""
    from tiny_llama import hugging_face_model

    directory = tmp_path_factory.mktemp("whole") / "model"
    hugging_face_model(directory, tie_word_embeddings=True)
    return directory


def _convert(directory: Path) -> Path:
    from tiny_models import save_llama

    save_llama(directory / "hf", tie_word_embeddings=True)
    command = ["-m", "megatron_lowbit", "convert", "--model", directory / "hf"]
    command += ["--save", directory / "ckpt", "--tensor-model-parallel-size", "3"]
    done = run(sys.executable, *command)
    assert f"--load {directory / 'ckpt'}" in done.stdout
    return directory / "ckpt"


@pytest.fixture(scope="session")
def calibrated(checkpoint) -> Path:
    """The checkpoint with a calibration index in it."""
    return _once("calibrated", partial(_calibrate, checkpoint))


def _calibrate(checkpoint: Path, directory: Path) -> Path:
    target = directory / "ckpt"
    shutil.copytree(checkpoint, target)
    text = ROOT / "examples" / "data" / "persuasion.txt"
    small = ["--sequences", "4", "--seq-length", "16"]
    command = ("-m", "megatron_lowbit", "calibrate", "--load", target, "--data", text)
    done = torchrun(3, *command, *small, "--budget", "4")
    assert "4 sequences, for shaped-hybrid with 0 of 48 features" in done.stdout
    assert re.search(r"^recipe: (3\.\d\d|4\.00) bits a value on average", done.stdout, re.MULTILINE)
    return target


# In ranks, unless a file has its own.


@pytest.fixture(scope="module")
def release(request) -> str:
    """The one that runs: the newest, or that of the parameter `release`."""
    name = getattr(request, "param", NEWEST)
    start_megatron(name)
    return name


@pytest.fixture(scope="module")
def model(release):
    return build(torch.bfloat16)


@pytest.fixture(scope="module")
def index(model):
    return index_of(model)


@pytest.fixture(scope="module")
def native(model) -> torch.Tensor:
    """The model's logits."""
    return whole_logits(model)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What runs behind these files has their memory."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        forks.close()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Has a test of ranks run there; writes the cell of the support matrix that a test stands for
    into JUnit's report; says where `_once` makes things.

    Where a mark names no release it is the one among the test's parameters.
    """
    base = item.config._tmp_path_factory.getbasetemp()
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    os.environ.setdefault(MADE, str(base.parent if is_worker else base))
    divert(item)
    for mark in item.iter_markers("support"):
        capability, *named = mark.args
        (release,) = named or [p for p in item.callspec.params.values() if p in RELEASES]
        item.user_properties.append(("support", f"{capability} @ {release}"))
