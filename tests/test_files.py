"""Outputs that cannot be written are refused before the work: by the helper, and by each tool."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import check_output

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def test_a_place_that_serves(tmp_path):
    check_output(tmp_path / "new" / "a.json")
    (tmp_path / "old.json").write_text("old")
    check_output(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "old"
    assert list((tmp_path / "new").iterdir()) == []


def test_places_that_do_not(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path, "is a directory: name a file"),
        (tmp_path / "fifo", "is not a regular file"),
        (Path("/dev/null"), "is not a regular file"),
        (tmp_path / "file" / "a.json", "cannot be written: "),
        (tmp_path / ("a" * 250), "cannot be written: File name too long"),
        (Path("/proc/a.json"), "cannot be written: "),
        (tmp_path / "a\0b", "cannot be written: embedded null"),
    ):
        with pytest.raises(LowbitError, match=message) as error:
            check_output(path, "--json")
        assert str(error.value).startswith("--json ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        ["bench_codecs.py", "--output", "."],
        ["bench_codecs.py", "--output", "meta.json"],
        ["bench_all_reduce.py", "--output", "."],
        ["bench_all_reduce.py", "--write-tuning", "."],
        ["predict.py", "--json", "."],
        ["predict.py", "--json", "/dev/null"],
        ["predict.py", "--plot", "a.xyz"],
        ["predict.py", "--plot", "."],
    ],
    ids=" ".join,
)
def test_tools_say_so_before_the_work(tmp_path, argv):
    (tmp_path / "meta.json.meta.json").mkdir()
    (tmp_path / "meta.meta.json").mkdir()
    command = [sys.executable, TOOLS / argv[0], *argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.count("\n") == 1 and argv[1] in done.stderr or "meta" in done.stderr
