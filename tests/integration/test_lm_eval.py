"""lm-evaluation-harness as it is, by its own megatron_lm backend, under the launcher at TP 3.

It is run as examples/lm_eval.sh runs it, but for torchrun: the ranks share one import of Megatron
(forks.py). It lies in .venv/lm-eval (tools/setup_env.sh with LOWBIT_LM_EVAL=yes).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import releases
from forks import forked
from releases import ROOT

PACKAGES = Path(sys.prefix) / "lm-eval"
WORKER = Path(__file__).with_name("lm_eval_worker.py")
LIMIT = 2
TASKS = ["arc-easy", "winogrande"]
FLAGS = ["--norm-epsilon", "3e-05"]
pytestmark = pytest.mark.skipif(
    not PACKAGES.is_dir(), reason="lm-eval is not installed: LOWBIT_LM_EVAL=yes tools/setup_env.sh"
)


def environment(directory: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(PACKAGES)])
    more = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "cache")}
    more |= {"MEGATRON_PATH": str(Path(sys.prefix, "lib")), "PYTHONPATH": path}
    return {**releases.environment(), **more}


def evaluate(load: Path, directory: Path, tasks: list[str], *extra: str, tp=3, devices=3):
    """One run of the harness; its samples go to DIRECTORY/out."""
    model = f"load={load},devices={devices},tensor_model_parallel_size={tp},seq_length=512"
    model += f",tokenizer_model={load}/tokenizer,extra_args={' '.join([*FLAGS, *extra])}"
    command = ["-m", "megatron_lowbit.launch", "-m", "lm_eval", "run", "--model", "megatron_lm"]
    command += ["--model_args", model, "--tasks", ",".join(tasks), "--limit", str(LIMIT)]
    command += ["--include_path", str(ROOT / "examples" / "lm_eval"), "--log_samples"]
    command += ["--output_path", str(directory / "out")]
    return forked(3, *command, env=environment(directory), timeout=900)


@pytest.fixture(scope="module")
def data(calibrated, tmp_path_factory) -> Path:
    """A working directory with the items, as examples/lm_eval.sh makes it."""
    directory = tmp_path_factory.mktemp("lm_eval")
    command = [sys.executable, ROOT / "examples" / "lm_eval" / "items.py", directory]
    command += ["--limit", str(LIMIT), "--seq-length", "100"]
    done = subprocess.run(
        [*command, "--tokenizer", calibrated / "tokenizer"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "boolq: 4 of 4 inputs are cut to 100 tokens\n" in done.stdout
    done = subprocess.run([*command, "--tokenizer", directory], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"items.py: error: --tokenizer {directory}: it has no tokenizer.json\n"
    return directory


def test_code_of_a_tokenizer_is_not_run(calibrated, tmp_path):
    """Nor asked for, whatever stdin says."""
    words = shutil.copytree(calibrated / "tokenizer", tmp_path / "words")
    settings = json.loads((words / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "evil.T"]}, "tokenizer_class": "T"}
    (words / "tokenizer_config.json").write_text(json.dumps(settings))
    (words / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    command = [sys.executable, ROOT / "examples" / "lm_eval" / "items.py", tmp_path / "out"]
    command += ["--limit", "1", "--seq-length", "100", "--tokenizer", words]
    done = subprocess.run(command, capture_output=True, text=True, input="y\n" * 9)
    assert done.returncode == 1
    assert "no code of a model is ever run" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def inside(data, monkeypatch) -> Path:
    monkeypatch.chdir(data)
    return data


def samples(directory: Path, task: str) -> list[dict]:
    """What the harness has logged of a task, by item."""
    path = next(directory.glob(f"out/**/samples_local-{task}_*.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


@pytest.mark.support("lm-evaluation-harness by its megatron_lm backend", releases.NEWEST)
def test_native_scores_are_ours_item_by_item(inside, calibrated):
    done = evaluate(calibrated, inside, [f"local-{task}" for task in TASKS])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "> native communication: no --lowbit-tp-comm" in done.stdout
    own = forked(3, WORKER, calibrated, ",".join(TASKS), str(LIMIT), "--bf16", *FLAGS)
    assert own.returncode == 0, own.stderr[-3000:]
    (line,) = (line for line in own.stdout.splitlines() if line.startswith("scores "))
    scores = json.loads(line.removeprefix("scores "))
    for task in TASKS:
        rows = samples(inside, task)
        theirs = [[float(answer[0]) for answer in row["filtered_resps"]] for row in rows]
        assert len(theirs) == LIMIT
        for one, other in zip(theirs, scores[task], strict=True):
            assert one == pytest.approx(other, abs=1e-3), (task, one, other)
    shutil.rmtree(inside / "out")


@pytest.mark.support("lm-evaluation-harness by its megatron_lm backend", releases.NEWEST)
def test_low_bits_are_on_and_text_is_generated(inside, calibrated):
    flags = ["--lowbit-tp-comm", "--lowbit-collective", "one-shot"]
    done = evaluate(calibrated, inside, ["local-answer"], *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "> low-bit communication: 4 sync points use shaped-hybrid" in done.stdout
    assert [type(row["filtered_resps"][0]) for row in samples(inside, "answer")] == [str] * LIMIT
    result = next(inside.glob("out/**/results_*.json")).read_text()
    assert "--lowbit-tp-comm --lowbit-collective one-shot" in result
    shutil.rmtree(inside / "out")


def script(data: Path, load: Path, **env: str) -> str:
    """The error of examples/lm_eval.sh."""
    env = {"LOWBIT_PYTHON": sys.executable, "CKPT": str(load), "OUT": str(data / "script"), **env}
    done = subprocess.run(
        ["bash", ROOT / "examples" / "lm_eval.sh"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    return done.stderr


def test_what_is_missing_is_said(data, calibrated, tmp_path):
    missing = f"lm_eval: no calibration index in {tmp_path}/lowbit: run examples/quickstart.sh"
    assert script(data, tmp_path) == f"{missing} first\n"
    python = tmp_path / "bin" / "python"  # an environment without the harness
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    said = script(data, calibrated, LOWBIT_PYTHON=str(python))
    assert (
        said
        == f"lm_eval: the package lm-eval is missing in {python}: pip install lm-eval==0.4.13\n"
    )
