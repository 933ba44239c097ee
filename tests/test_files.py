"""Outputs that cannot be written are refused before the work: by the helper, and by each tool.

Files that are replaced are replaced together.
"""

import os
from pathlib import Path

import pytest
from processes import python

from megatron_lowbit import files
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
    done = python(TOOLS / argv[0], *argv[1:], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.count("\n") == 1 and argv[1] in done.stderr or "meta" in done.stderr


def failing(source, target) -> None:
    raise OSError(28, "No space left on device")


def doing_nothing(source, target) -> None:
    """Says that it renamed, as git apply says that it applied."""


@pytest.mark.parametrize("fault", [failing, doing_nothing])
def test_files_are_replaced_together_or_not_at_all(tmp_path, monkeypatch, fault):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(b"old")
    paths[0].chmod(0o640)
    linked = tmp_path / "linked"
    linked.hardlink_to(paths[0])
    real = os.replace

    def faulty(source, target):
        is_fault = Path(target) == paths[2] and Path(source).read_bytes() == b"new"
        (fault if is_fault else real)(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", faulty)
        with pytest.raises((OSError, LowbitError), match="No space left|does not hold what was"):
            files.replace_together(dict.fromkeys(paths, b"new"))
    assert [path.read_bytes() for path in paths] == [b"old"] * 3
    files.replace_together(dict.fromkeys(paths, b"new"))
    assert [path.read_bytes() for path in paths] == [b"new"] * 3
    assert paths[0].stat().st_mode & 0o777 == 0o640
    assert linked.read_bytes() == b"old", "a package manager's cache"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "linked"]
