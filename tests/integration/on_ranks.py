"""Tests that run in every rank of a group: `pytest.mark.on_ranks(3)`.

Such a test is written as any other: it arranges, acts and asserts, with fixtures and parameters.
In the test's own process it does nothing but ask for its outcome. All tests of a file that have the
same ranks, and the same parameter `release`, run in one group of forked ranks (`forks.py`), each of
which is pytest itself: Megatron is imported once, and fixtures of a wider scope are made once.

A rank whose test fails ends at once, so that the others cannot wait for it for ever. The tests
behind it run in a new group. `directory_of_all` gives a directory that all ranks share; `tmp_path`
is each rank's own. `on_ranks(3, path=function)` has Megatron imported by the PYTHONPATH that
`function(release, directory)` gives, for ranks that share that directory.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forks import ask
from releases import MAIN, NEWEST, ROOT, describe_main, environment

from megatron_lowbit.integration.cpu.device import enable_cpu

INSIDE = "LOWBIT_TEST_RANKS"  # in ranks: the directory of their group
_LONGEST = 1200  # seconds that all tests of a group may take together
_outcomes: dict[str, dict] = {}  # by node id


def directory_of_all(name: str) -> Path:
    """A directory that the ranks of this group share."""
    directory = Path(os.environ[INSIDE], re.sub(r"\W+", "_", name))
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="session", autouse=True)
def _group_of_ranks() -> Iterator[None]:
    """In ranks: their process group."""
    if INSIDE in os.environ:
        enable_cpu()
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    yield


def divert(item: pytest.Item) -> None:
    """Have an item with the mark `on_ranks` run in ranks, and not here."""
    if item.get_closest_marker("on_ranks") and INSIDE not in os.environ:
        item.setup = lambda: None  # its fixtures are made in the ranks
        item.runtest = partial(_in_ranks, item)


def _in_ranks(item: pytest.Item) -> None:
    """End as the test has ended in its ranks; have it run if it has not."""
    if _key(item)[2] == MAIN:  # what it was goes into JUnit's report
        item.user_properties.append((MAIN, describe_main()))
    if item.nodeid not in _outcomes:
        alike = [other for other in item.session.items if _key(other) == _key(item)]
        _run([other.nodeid for other in alike[alike.index(item) :]], *_key(item)[1:])
    outcome = _outcomes[item.nodeid]
    if outcome["outcome"] == "skipped":
        pytest.skip(outcome["text"])
    if outcome["outcome"] == "failed":
        pytest.fail(outcome["text"], pytrace=False)


def _key(item: pytest.Item) -> tuple[Path, int, str, Callable | None] | None:
    """What tests of one group have in common: file, number of ranks, release, its path."""
    mark = item.get_closest_marker("on_ranks")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    release = parameters.get("release", NEWEST)
    return mark and (item.path, *mark.args, release, mark.kwargs.get("path"))


def _run(nodes: list[str], ranks: int, release: str, path: Callable | None) -> None:
    """Run tests in ranks of a release; keeps the outcomes up to the first that is a failure."""
    inside = {k: v for k, v in environment(release).items() if not k.startswith("PYTEST_")}
    inside["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # nobody in ranks needs them
    command = ["-m", "pytest", "-c", ROOT / "tests" / "pytest.ini", f"--rootdir={ROOT}"]
    with tempfile.TemporaryDirectory() as directory:
        inside |= {INSIDE: directory, "PYTEST_DEBUG_TEMPROOT": directory}
        if path is not None:
            inside["PYTHONPATH"] = path(release, Path(directory))
        command += ["-p", "no:cacheprovider", *(f"{ROOT}/{node}" for node in nodes)]
        ended = ask(command, ranks=ranks, env=inside, timeout=_LONGEST)
        found = [_read(Path(directory, f"rank{rank}.jsonl")) for rank in range(ranks)]
    for node in nodes:
        by_rank = [reports.get(node) for reports in found]
        _outcomes[node] = _outcome(by_rank, ended)
        if _outcomes[node]["outcome"] == "failed":
            return
    if any(ended["status"]):  # behind the last test
        _outcomes[nodes[-1]] = _outcome([None] * ranks, ended)


def _read(path: Path) -> dict[str, dict]:
    """The first report of each test: one that is skipped has a second, of its end."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {report["id"]: report for report in map(json.loads, reversed(lines))}


def _outcome(by_rank: list[dict | None], ended: dict) -> dict:
    """Of a test, given its report by each rank: the first failure, where there is one."""
    missing = [rank for rank, report in enumerate(by_rank) if report is None]
    failures = [report for report in by_rank if report and report["outcome"] == "failed"]
    if failures:
        return min(failures, key=lambda report: report["time"])
    if missing:
        said = "".join(
            f"rank {rank}:\n{ended['out'][rank]}{ended['err'][rank]}" for rank in missing
        )
        return {"outcome": "failed", "text": f"ranks {missing} ended before it: {said[-8000:]}"}
    return by_rank[0]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In ranks: write down how a test ended; leave if it failed."""
    if INSIDE not in os.environ or (report.passed and report.when != "teardown"):
        return
    rank = os.environ["RANK"]  # a test may have ended the process group
    said = {"id": report.nodeid, "outcome": report.outcome, "time": report.start, "text": ""}
    if report.failed:
        said |= {"time": report.stop, "text": f"rank {rank}: {report.longreprtext}"}
        said["text"] += "".join(f"\n-- {title}\n{text}" for title, text in report.sections)
    elif report.skipped:
        said["text"] = report.longrepr[2].removeprefix("Skipped: ")
    with Path(os.environ[INSIDE], f"rank{rank}.jsonl").open("a") as file:
        file.write(json.dumps(said) + "\n")
    if report.failed:
        os._exit(1)
