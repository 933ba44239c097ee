"""The measurement of robustness, all of it, on a tiny random model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from releases import environment

pytest.importorskip("transformers")
WORKER = Path(__file__).with_name("robustness_worker.py")
CODECS = ["static-hybrid", "rotated-hybrid", "shaped-hybrid", "recipe"]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("robustness")
    command = [sys.executable, WORKER, directory]
    environ = environment("0.19.2")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environ
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (directory / "stdout").write_text(done.stdout)
    return directory


def test_every_calibration_is_measured_on_every_text_with_every_codec(out):
    content = json.loads((out / "whole.json").read_text())
    assert (content["model"], content["tp_size"], content["budget"]) == ("tiny", 2, 4.2)
    assert [text["name"] for text in content["texts"]] == ["prose", "code", "dialogue"]
    assert all(text["tokens"] == 256 for text in content["texts"])
    rows = content["calibrations"]
    assert [(row["kind"], row["sequences"]) for row in rows] == [("prose", 4), ("code", 2)]
    assert rows[0]["same_features"] == 1
    for row in rows:
        assert list(row["results"]) == ["prose", "code", "dialogue"]
        for results in row["results"].values():
            assert list(results) == CODECS
            kl = {codec: result["kl"] for codec, result in results.items()}
            assert min(kl.values()) > 0, kl
            assert kl["static-hybrid"] > 2 * kl["shaped-hybrid"], kl
    assert rows[0]["results"] != rows[1]["results"]
    printed = (out / "stdout").read_text()
    assert "calibration prose-4-1\ncalibration code-2-1\ntiny, TP 2, simulated, 256" in printed
    assert "| prose, 4 sequences, seed 1 |         100 % |" in printed


def test_a_stopped_run_keeps_its_calibrations_and_goes_on_to_the_same_bytes(out):
    seen = json.loads((out / "seen.json").read_text())
    assert seen["whole"] is None
    assert seen["stopped"] == "stopped"
    assert {"prose-4-1", "code-2-1"} <= set(seen["kept"])
    assert "calibrated at tensor parallel size 2, this run has 4" in seen["other"]
    assert seen["resumed"] is None
    assert (out / "again.json").read_bytes() == (out / "whole.json").read_bytes()
    assert seen["left"] == ["again.json", "examples", "tokenizer", "whole.json"]
