"""A test in ranks passes if it passes in all of them, and says why if it does not."""

import subprocess
import sys
from pathlib import Path

from releases import ROOT

SAMPLE = Path(__file__).with_name("on_ranks_sample.py")


def test_outcomes():
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "tests" / "pytest.ini", "-v"]
    command += [f"--rootdir={ROOT}", "-p", "no:cacheprovider", SAMPLE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    lines = [line for line in done.stdout.splitlines() if "::" in line and line.endswith("%]")]
    said = [line.split("::")[1].split()[:2] for line in lines]
    assert said == [
        ["test_a_sum", "PASSED"],
        ["test_wrong_on_all_ranks[1.0]", "PASSED"],
        ["test_wrong_on_all_ranks[2.0]", "FAILED"],
        ["test_wrong_on_one_rank_while_the_other_waits", "FAILED"],
        ["test_a_skip", "SKIPPED"],
        ["test_a_rank_that_ends", "FAILED"],
        ["test_a_fixture_is_made_once_in_a_group", "PASSED"],
        ["test_a_rank_that_fails_at_its_end", "FAILED"],
    ], done.stdout
    for text in ("AssertionError: of two\n", "rank 1: ", "AssertionError: not mine\n", "farewell"):
        assert text in done.stdout, done.stdout
