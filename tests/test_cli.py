"""What the command lines share: exit statuses, one line, and nothing left behind."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import python

from megatron_lowbit import cli

PROGRAM = """
import sys, time
from pathlib import Path
from megatron_lowbit import cli
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import atomic_directory

def main():
    {body}

cli.run(main)
"""

AT_END = """import megatron_lowbit.at_end as a
    def full(): raise OSError(28, "No space left on device", "f")
    a.at_end(full)
    """
IN_FLIGHT = """import atexit, torch, torch.distributed as dist
    atexit.register(print, "handled")
    dist.init_process_group("gloo", f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
    group = sys.group = dist.new_group()
    for _ in range(20):
        dist.all_reduce(torch.ones(1_000_000), group=group, async_op=True)"""


def _start(body: str, directory: Path, *arguments: object) -> subprocess.Popen:
    (directory / "tool.py").write_text(PROGRAM.format(body=body))
    return subprocess.Popen(
        [sys.executable, "tool.py", *map(str, arguments)],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("pass", 0, ""),
        ("raise LowbitError('7 is not 8: say 8')", 1, "tool.py: error: 7 is not 8: say 8"),
        ("open('/no/such/file')", 1, "No such file or directory: '/no/such/file'"),
        ("import no_such_package", 1, "the package no_such_package is missing: pip install"),
        ("raise RuntimeError('Connection closed by peer')", 1, "another rank is gone"),
        ("raise KeyboardInterrupt", 130, "tool.py: interrupted"),
        (AT_END, 1, "tool.py: error: [Errno 28] No space left on device: 'f'"),
        (f"{AT_END}sys.exit(0)", 1, "tool.py: error: [Errno 28] No space left on device: 'f'"),
        (f"{AT_END}raise LowbitError('first')", 1, "tool.py: error: first"),
    ],
)
def test_exit_status_and_one_line(tmp_path, body, status, message):
    process = _start(body, tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert message in errors
    assert len(errors.splitlines()) == (1 if message else 0)


def test_sums_in_flight_do_not_kill_a_run_at_its_end(tmp_path):
    """Gloo's threads let go of their tensors while Python ends: SIGABRT, one time in two here."""
    for trial in range(3):
        ranks = [_start(IN_FLIGHT, tmp_path, tmp_path / f"store{trial}", rank) for rank in (0, 1)]
        ended = [(*rank.communicate(timeout=60), rank.returncode) for rank in ranks]
        assert [(out, status) for out, _, status in ended] == [("handled\n", 0)] * 2, ended


def test_what_runs_at_exit_can_fail_a_script_that_no_cli_runs(tmp_path):
    """All steps are tried, once; a fault of ours keeps its traceback, and the status is not 0."""
    for body, status, message in (
        ("at_end(full); at_end(lambda: print('second'))", 1, "^s.py: error: .*device: 'f'\n$"),
        ("at_end(lambda: 1 / 0)", 1, "ZeroDivisionError"),
        ("at_end(full); do()", 1, "Traceback.*device: 'f'"),
        ("at_end(lambda: print('second'))", 0, "^$"),
    ):
        (tmp_path / "s.py").write_text(
            "from megatron_lowbit.at_end import at_end, do_steps as do\n"
            "def full(): raise OSError(28, 'No space left on device', 'f')\n" + body
        )
        done = python("s.py", cwd=tmp_path)
        assert (done.returncode, done.stdout.count("second")) == (status, body.count("second"))
        assert re.search(message, done.stderr, re.DOTALL), done.stderr


@pytest.mark.parametrize("error", ["ValueError('ours')", "RuntimeError('ours')"])
def test_faults_of_ours_keep_their_traceback(tmp_path, error):
    process = _start(f"raise {error}", tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_half_written(tmp_path, number):
    body = """with atomic_directory(Path("out/index")) as staging:
        (staging / "half").touch()
        time.sleep(60)"""
    process = _start(body, tmp_path)
    while not list(tmp_path.glob("out/.index.tmp-*/half")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "tool.py: interrupted\n"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("[../gloo/transport/tcp/buffer.cc:72] Check failed"), True),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_the_loss_of_another_rank_is_told_from_faults_of_ours(error, lost):
    assert cli._is_lost_rank(error) is lost


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        (cli.positive, "three", "'three' is not a whole number above zero"),
        (cli.positive, "0", "'0' is not a whole number above zero"),
        (cli.positive_number, "x", "'x' is not a finite number above zero"),
        (cli.positive_number, "nan", "'nan' is not a finite number above zero"),
        (cli.positive_number, "inf", "'inf' is not a finite number above zero"),
    ],
)
def test_a_bad_number_is_named_with_what_is_wanted(kind, text, wanted, capsys):
    parser = cli.described(None)
    parser.add_argument("--n", type=kind)
    with pytest.raises(SystemExit):
        parser.parse_args(["--n", text])
    assert f"argument --n: {wanted}" in capsys.readouterr().err


@pytest.mark.parametrize(("is_terminal", "seconds"), [(True, 0.1), (False, 10.0)])
def test_a_log_gets_few_states_of_a_bar(monkeypatch, is_terminal, seconds):
    monkeypatch.setattr(cli, "RANK", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    assert cli.progress("reading", "text")(range(0)).mininterval == seconds
