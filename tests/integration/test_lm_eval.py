"""lm-evaluation-harness as it is, by its own megatron_lm backend, under the launcher at TP 3.

It is run as examples/lm_eval.sh runs it, but for torchrun: the ranks share one import of Megatron
(forks.py). It lies in .venv/lm-eval (tools/setup_env.sh with LOWBIT_LM_EVAL=yes).
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import releases
from damaged_models import ask_for_code
from forks import forked
from releases import ROOT, run
from torch.nn.functional import pad

from megatron_lowbit.evaluation.measures.task_data import read_task
from megatron_lowbit.evaluation.measures.tasks import log_likelihoods, tokenize_item
from megatron_lowbit.integration.runtime import session
from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args

PACKAGES = Path(sys.prefix) / "lm-eval"
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


def evaluate(load: Path, directory: Path, tasks: list[str], *extra: str):
    """One run of the harness, in the directory of its items; its samples go to out/ there."""
    model = f"load={load},devices=3,tensor_model_parallel_size=3,seq_length=512"
    model += f",tokenizer_model={load}/tokenizer,extra_args={' '.join([*FLAGS, *extra])}"
    command = ["-m", "megatron_lowbit.launch", "-m", "lm_eval", "run", "--model", "megatron_lm"]
    command += ["--model_args", model, "--tasks", ",".join(tasks), "--limit", str(LIMIT)]
    command += ["--include_path", str(ROOT / "examples" / "lm_eval"), "--log_samples"]
    command += ["--output_path", str(directory / "out")]
    with contextlib.chdir(directory):
        return forked(3, *command, env=environment(directory), timeout=900)


def items(directory: Path, tokenizer: Path, **more) -> subprocess.CompletedProcess:
    """What writes the items, as examples/lm_eval.sh runs it."""
    command = [ROOT / "examples" / "lm_eval" / "items.py", directory, "--tokenizer", tokenizer]
    return run(sys.executable, *command, "--limit", LIMIT, "--seq-length", "100", **more)


@pytest.fixture(scope="module")
def data(calibrated, tmp_path_factory) -> Path:
    """A working directory with the items, as examples/lm_eval.sh makes it."""
    directory = tmp_path_factory.mktemp("lm_eval")
    done = items(directory, calibrated / "tokenizer")
    assert "boolq: 4 of 4 inputs are cut to 100 tokens\n" in done.stdout
    done = items(directory, directory, status=1)
    assert done.stderr == f"items.py: error: --tokenizer {directory}: it has no tokenizer.json\n"
    return directory


def test_code_of_a_tokenizer_is_not_run(calibrated, tmp_path):
    """Nor asked for, whatever stdin says."""
    words = shutil.copytree(calibrated / "tokenizer", tmp_path / "words")
    ask_for_code(words, "tokenizer_config.json")
    done = items(tmp_path / "out", words, input="y\n" * 9, status=1)
    assert "no code of a model is ever run" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("ran"))


def samples(directory: Path, task: str) -> list[dict]:
    """What the harness has logged of a task, by item."""
    path = next(directory.glob(f"out/**/samples_local-{task}_*.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


@pytest.fixture(scope="module")
def natively(calibrated, once) -> Path:
    """Where the harness has scored the items natively."""

    def make(directory: Path) -> Path:
        items(directory, calibrated / "tokenizer")
        done = evaluate(calibrated, directory, [f"local-{task}" for task in TASKS])
        assert "> native communication: no --lowbit-tp-comm" in done.stdout
        return directory

    return once("natively", make)


@pytest.mark.on_ranks(3)
@pytest.mark.support("lm-evaluation-harness by its megatron_lm backend", releases.NEWEST)
def test_native_scores_are_ours_item_by_item(natively, calibrated):
    """One by one, as the harness at batch size 1 scores them: nothing else is padded."""
    args = parse_megatron_args(["--load", str(calibrated), "--bf16", *FLAGS])
    session.initialize(args)
    from megatron.core import parallel_state

    tokenizer = session.build_tokenizer(args, special_tokens=False)
    group = parallel_state.get_tensor_model_parallel_group()
    ours = session.language_model(args, session.load_model(args), tokenizer, group=group)
    # As the harness's backend does it: the last token runs, too (in BF16 one row more rounds
    # elsewhere), and what pads the vocabulary counts as entries of it.
    alike = replace(
        ours,
        logits=lambda tokens: ours.logits(pad(tokens, (0, 1)))[:, :-1],
        vocab_size=args.padded_vocab_size,
    )
    for task in TASKS:
        asked = read_task(task, limit=LIMIT).items
        for item, row in zip(asked, samples(natively, task), strict=True):
            mine = [log_likelihoods([one], alike)[0] for one in tokenize_item(item, ours)]
            theirs = [float(answer[0]) for answer in row["filtered_resps"]]
            assert theirs == pytest.approx(mine, abs=1e-3), task


@pytest.mark.support("lm-evaluation-harness by its megatron_lm backend", releases.NEWEST)
def test_low_bits_are_on_and_text_is_generated(data, calibrated):
    flags = ["--lowbit-tp-comm", "--lowbit-collective", "one-shot"]
    done = evaluate(calibrated, data, ["local-answer"], *flags)
    assert "> low-bit communication: 4 sync points use shaped-hybrid" in done.stdout
    assert [type(row["filtered_resps"][0]) for row in samples(data, "answer")] == [str] * LIMIT
    result = next(data.glob("out/**/results_*.json")).read_text()
    assert "--lowbit-tp-comm --lowbit-collective one-shot" in result


def script(data: Path, load: Path, **env: str) -> str:
    """The error of examples/lm_eval.sh."""
    env = {"LOWBIT_PYTHON": sys.executable, "CKPT": str(load), "OUT": str(data / "script"), **env}
    script = ROOT / "examples" / "lm_eval.sh"
    return run("bash", script, env={**os.environ, **env}, status=1).stderr


def test_what_is_missing_is_said(data, calibrated, tmp_path):
    missing = f"lm_eval: no calibration index in {tmp_path}/lowbit: run examples/quickstart.sh"
    assert script(data, tmp_path) == f"{missing} first\n"
    python = tmp_path / "bin" / "python"  # an environment without the harness
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    missing = f"lm_eval: the package lm-eval is missing in {python}: pip install lm-eval==0.4.13"
    assert script(data, calibrated, LOWBIT_PYTHON=str(python)) == f"{missing}\n"
