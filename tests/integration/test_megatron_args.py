"""Megatron's own parser for one process: what it takes, and what gets one line."""

import argparse
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.arguments import add_lowbit_args
from megatron_lowbit.integration.runtime.checkpoint import TRACKER
from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args

pytestmark = pytest.mark.on_ranks(1)


def test_lowbit_arguments_are_megatron_s_too(checkpoint):
    argv = ["--load", str(checkpoint), "--tensor-model-parallel-size", "1"]
    argv += ["--lowbit-tp-comm", "--lowbit-bits", "3"]
    args = vars(parse_megatron_args(argv, extra_args_provider=add_lowbit_args))
    given = {k: v for k, v in args.items() if k.startswith("lowbit") and v is not None}
    assert given == {"lowbit_tp_comm": "", "lowbit_bits": "3"}


@pytest.mark.parametrize("argv", [["--no-such-argument"], ["--tensor-model-parallel-size", "many"]])
def test_wrong_arguments_exit_with_one_line(checkpoint, capsys, argv):
    with pytest.raises(SystemExit) as caught:
        parse_megatron_args(["--load", str(checkpoint), *argv])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in argv), line


def refused(path: Path, *argv: str) -> str:
    """The one line that a checkpoint gets."""
    with pytest.raises(LowbitError) as caught:
        parse_megatron_args(["--load", str(path), *argv])
    (line,) = str(caught.value).strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("sizes", "text"),
    [("", "by 3"), ("--tensor-model-parallel-size 1 --pipeline-model-parallel-size 2", "by 2")],
)
def test_sizes_that_do_not_divide(checkpoint, sizes, text):
    line = refused(checkpoint, *sizes.split())
    assert "world size 1" in line
    assert text in line


def without(path: Path) -> None:
    path.rmdir()


def no_iteration(path: Path) -> None:
    (path / TRACKER).write_text("5")


def no_number(path: Path) -> None:
    (path / TRACKER).write_text("five")


def hole(path: Path) -> None:
    """A legacy checkpoint's file that lost a tensor's data."""
    no_iteration(path)
    file, whole = path / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt", path / "whole.pt"
    file.parent.mkdir(parents=True)
    torch.save({"args": argparse.Namespace(), "iteration": 5, "model": torch.ones(9)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            if not name.endswith("data/0"):
                target.writestr(name, source.read(name))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (without, ["no such directory"]),
        (lambda path: None, ["latest_checkpointed_iteration.txt"]),
        (no_iteration, ["iter_0000005"]),
        (no_number, ["its tracker file names no iteration"]),
        (hole, ["Megatron cannot read it", "MEGATRON_LOWBIT_VERBOSE=1"]),
    ],
)
def test_a_directory_that_is_no_checkpoint(tmp_path, make, words):
    make(tmp_path)
    line = refused(tmp_path)
    assert all(word in line for word in [str(tmp_path), *words]), line
