"""Emulated links: what they carry, how they fail, and that nothing of them stays behind."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from processes import is_alive, wait_until

from megatron_lowbit.benchmark.collectives import links, ranks
from megatron_lowbit.benchmark.collectives.links import Links, emulated_links, parse_rate
from megatron_lowbit.benchmark.collectives.ranks import plain_ranks
from megatron_lowbit.errors import LowbitError

RATE = parse_rate("50mbit")
SIZE = 1_000_000  # bytes each rank sends

# Swap SIZE bytes with the other rank; print the seconds it took the slower of the two.
EXCHANGE = f"""
import time, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
assert dist.get_world_size() == 2
mine = torch.arange({SIZE}).add(rank).to(torch.uint8)
expected = torch.arange({SIZE}).add(1 - rank).to(torch.uint8)
got = torch.zeros_like(mine)
dist.barrier()
start = time.perf_counter()
wait = [dist.irecv(got, 1 - rank), dist.isend(mine, 1 - rank)]
for work in wait:
    work.wait()
seconds = torch.tensor([time.perf_counter() - start])
dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
assert torch.equal(got, expected)
print(seconds.item())
dist.destroy_process_group()
"""

HELD = """
import sys
from megatron_lowbit.benchmark.collectives.links import emulated_links
with emulated_links(2, 10**8) as links:
    links.run(["sh", "-c", "sleep 600 & echo $! > $0/pid$RANK; wait", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def working_links():
    """Skip where links cannot be made: no root, no iproute2, no veth or tbf in the kernel."""
    try:
        with emulated_links(1, RATE):
            pass
    except LowbitError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["links", "plain"])
def two_ranks(request):
    """Two ranks, behind links and without."""
    if request.param == "links":
        request.getfixturevalue("working_links")
        with emulated_links(2, RATE) as started:
            yield started
    else:
        with plain_ranks(2) as started:
            yield started
    assert _spaces() == []


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr(ranks, "_GRACE", 0.3)


def _spaces(pid: int | None = None) -> list[str]:
    """The namespaces that process `pid` (by default this one) has made and not removed."""
    if shutil.which("ip") is None:
        return []
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    return [name for name in names if name.startswith(f"lowbit-{pid or os.getpid()}-")]


@pytest.mark.parametrize(
    ("text", "rate"),
    [("100mbit", 100e6), ("1gbit", 1e9), ("2.5Gbit", 2.5e9), (" 64kbit ", 64e3)],
)
def test_parse_rate(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "1", "1gb", "fast", "-1gbit", "0mbit", "1e3mbit", "1 gbit"])
def test_parse_rate_names_the_bad_value(text):
    with pytest.raises(LowbitError, match="is no link rate: write it like 100mbit") as raised:
        parse_rate(text)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize("count", [0, -1, 255])
def test_number_of_ranks(count):
    with pytest.raises(LowbitError, match=f"^{count} is no number of ranks"), plain_ranks(count):
        pass


def test_without_iproute2(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LowbitError, match="need ip and tc.*install iproute2"):
        emulated_links(2, RATE).__enter__()


def test_without_root(monkeypatch):
    monkeypatch.setattr(links.shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(links.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(links, "_command", lambda *argv: pytest.fail(f"ran {argv}"))
    with pytest.raises(LowbitError, match="need root, and this is user 1000"):
        emulated_links(2, RATE).__enter__()


@pytest.mark.slow
def test_exchange(two_ranks, capfd):
    two_ranks.run([sys.executable, "-c", EXCHANGE])
    seconds = float(capfd.readouterr().out)
    if isinstance(two_ranks, Links):
        # What the rate allows, less the burst that an idle link passes at once.
        least = 0.9 * SIZE * 8 / RATE
        assert seconds >= least, f"{SIZE} bytes took {seconds:.4f} s, at least {least:.4f} expected"


def test_output_and_environment(two_ranks, capfd):
    command = 'echo $RANK/$WORLD_SIZE; echo "$LOCAL_RANK/$LOCAL_WORLD_SIZE $EXTRA" >&2'
    two_ranks.run(["sh", "-c", command], env={"EXTRA": "more"})
    out, err = capfd.readouterr()
    assert out == "0/2\n"
    assert sorted(err.splitlines()) == ["0/2 more", "1/2 more"]


@pytest.mark.parametrize(
    ("ending", "words"),
    [("exit 3", "ended with exit status 3"), ("kill -9 $$", "was killed by SIGKILL")],
)
def test_a_rank_that_ends(two_ranks, short_grace, tmp_path, ending, words):
    last = "until [ -s $0 ]; do sleep 0.05; done"
    stubborn = "trap '' TERM; echo $$ > $0; while :; do sleep 0.1; done"
    command = f"if [ $RANK = 1 ]; then {last}; {ending}; else {stubborn}; fi"
    with pytest.raises(LowbitError, match=f"^rank 1 of 2 {words}"):
        two_ranks.run(["sh", "-c", command, str(tmp_path / "pid")])
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_nothing_stays_of_half_built_links(working_links, monkeypatch):
    def refuse(self, space, device):
        assert len(_spaces()) == 2
        raise LowbitError("no tbf")

    monkeypatch.setattr(Links, "_shape", refuse)
    with pytest.raises(LowbitError, match="^no tbf$"):
        emulated_links(2, RATE).__enter__()
    assert _spaces() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_stays_after_a_signal(working_links, tmp_path, number):
    script = subprocess.Popen([sys.executable, "-c", HELD, str(tmp_path)], stderr=-1)
    pids = [tmp_path / "pid0", tmp_path / "pid1"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in pids))
    assert len(_spaces(script.pid)) == 3
    script.send_signal(number)
    script.communicate(timeout=20)
    assert script.returncode in (128 + number, -number)
    assert _spaces(script.pid) == []
    wait_until(lambda: not any(is_alive(int(file.read_text())) for file in pids))
