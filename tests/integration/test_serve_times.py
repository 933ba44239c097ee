"""examples/serve_times.py: its table, and what is said where it cannot measure.

Its figures need links, root rights and minutes: benchmark/README.md has them.
"""

import importlib.util
import os
import re
import sys

import pytest
from releases import ROOT, run

SCRIPT = ROOT / "examples" / "serve_times.py"


def said(*command, **env: str) -> str:
    return run(sys.executable, SCRIPT, *command, env={**os.environ, **env}, status=1).stderr


def test_ratios_are_against_the_first_way():
    spec = importlib.util.spec_from_file_location("serve_times", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    native = {"way": "native", "ttft": 4.0, "alone": 2.0, "together": 10.0}
    low = {"way": "one-shot", "ttft": 2.0, "alone": 1.0, "together": 25.0}
    lines = re.sub("  +", " ", module.table([native, low])).splitlines()
    assert lines[2] == "| native | 4.00 s (1.00x) | 2.00 (1.00x) | 10.00 (1.00x) |"
    assert lines[3] == "| one-shot | 2.00 s (2.00x) | 1.00 (0.50x) | 25.00 (2.50x) |"


def test_a_checkpoint_without_an_index(tmp_path):
    line = f"serve_times.py: error: no calibration index in {tmp_path}/lowbit: calibrate it first"
    assert said("--load", tmp_path).splitlines() == [line]


def test_a_text_that_is_too_short(calibrated, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "text.txt").write_text("the world")
    words = said("--load", calibrated, "--data", tmp_path / "text.txt")
    assert "text.txt is too short" in words and words.count("\n") == 1


def test_a_server_that_ends_is_shown(tmp_path):
    (tmp_path / "prompts.json").write_text("[]")
    words = said("--rank", tmp_path, "--load", tmp_path / "none", RANK="1")
    assert "the server has ended; its last messages:" in words
    assert "RANK=1 without WORLD_SIZE" in words  # what the launcher said
