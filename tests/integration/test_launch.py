"""Megatron's scripts through `python -m megatron_lowbit.launch`, and what goes wrong there.

One run is as users start it, under torchrun at TP 3; the other command lines share one import of
Megatron (forks.py). With MEGATRON_LM=DIR a checkout's own script runs on the
quickstart's checkpoint, too.
"""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damaged_models import ask_for_code
from forks import ask
from releases import ROOT, environment, run, torchrun

SCRIPT = Path(__file__).with_name("megatron_script.py")
GENERATE = ROOT / "examples" / "generate.py"
QUICKSTART = Path(os.environ.get("QUICKSTART_CKPT", ROOT / "out" / "quickstart" / "ckpt"))
PROMPTS = ["the world", "a model of"]
# What capital words of a command line stand for, and CKPT: the calibrated checkpoint, HERE:
# `directory`. FLAGS are what convert_hf.py prints for the checkpoint.
WORDS = {
    "ACT": "SCRIPT FLAGS --act",
    "MOVED": "SCRIPT --load HERE/moved COMMON --tensor-model-parallel-size 1",
    "SCRIPT": f"LAUNCH {SCRIPT}",
    "LAUNCH": "-m megatron_lowbit.launch",
    "FLAGS": "--load CKPT COMMON",
    "COMMON": "--use-checkpoint-args --ckpt-format torch_dist --norm-epsilon 3e-05",
    "THREE": "--tensor-model-parallel-size 3 --bf16",
    "FIXED": "--lowbit-tp-comm --lowbit-collective one-shot",
}
# A Megatron with patches/arguments.patch alone, which switches nothing on, and no launcher.
FORK = """
import argparse, sys
from megatron_lowbit.integration import hooks
parser = argparse.ArgumentParser()
parser.add_argument("--load")
hooks.add_arguments(parser).parse_args()
sys.exit(0)
"""
ON = "> low-bit communication: 4 sync points use shaped-hybrid"


def _environment() -> dict[str, str]:
    """Without a checkout: the installed release, and what else is on the path."""
    env = environment() | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    env.pop("MEGATRON_LM", None)
    env["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    return env


@pytest.fixture(scope="module")
def directory(calibrated, tmp_path_factory) -> Path:
    """Scripts; the checkpoint after a move; a tokenizer that leaves its marks; one with code."""
    directory = tmp_path_factory.mktemp("launched")
    (directory / "other.py").write_text("import sys\nprint('done', sys.argv[1:])\n")
    (directory / "fork.py").write_text(FORK)
    common = shutil.copytree(calibrated, directory / "moved") / "release" / "common.pt"
    content = torch.load(common, weights_only=False)
    content["args"].tokenizer_model = str(directory / "where" / "it" / "was")
    torch.save(content, common)
    marks, coded = (
        shutil.copytree(calibrated / "tokenizer", directory / name) for name in ("marks", "coded")
    )
    content = json.loads((marks / "tokenizer.json").read_text())
    (marks / "tokenizer.json").write_text(json.dumps({**content, "decoder": None}))
    ask_for_code(coded, "tokenizer_config.json")
    return directory


@pytest.fixture(scope="module")
def words(calibrated, directory) -> Callable[[str], list[str]]:
    """Takes a command line apart."""
    known = {**WORDS, "CKPT": str(calibrated), "HERE": str(directory)}

    def filled(line: str) -> str:
        return re.sub(rf"\b({'|'.join(known)})\b", lambda found: filled(known[found[0]]), line)

    return lambda line: shlex.split(filled(line))


@pytest.fixture(scope="module")
def start(words) -> Callable[..., dict]:
    """Runs a command line; gives what each rank ended with: "status", "out", "err"."""

    def start(line: str, *, ranks: int | None = None, interrupt="", **env: str) -> dict:
        env = {**_environment(), **env}
        return ask(words(line), ranks=ranks, env=env, interrupt=interrupt, timeout=120)

    return start


def said(ended: dict) -> str:
    """What a process says that must not fail."""
    assert ended["status"] == [0], ended
    return ended["out"][0]


def _line(result: dict, rank: int = 0) -> str:
    """The launcher's own error, which must be one line."""
    (line,) = re.findall(
        r"(?:launch|megatron_script|fork).py: (.*)$", result["err"][rank], re.MULTILINE
    )
    assert "Traceback" not in result["err"][rank], result["err"][rank]
    return line


def refused(result: dict, message: str, status: int = 1) -> None:
    """A process ends with its one line."""
    assert result["status"] == [status], result
    assert re.search(message, _line(result)), result["err"]


def test_a_script_gives_what_generate_py_gives(start, words, tmp_path):
    stats, prompts = tmp_path / "stats.json", f"--prompts {shlex.join(PROMPTS)}"
    line = f"SCRIPT FLAGS THREE FIXED --lowbit-stats {stats} {prompts}"
    done = torchrun(3, *words(line), env=_environment())
    assert done.stdout.count("low-bit communication") == done.stdout.count(ON) == 1
    assert re.search("> no CUDA here, so: .*transformer_impl=local", done.stdout)
    (texts,) = re.findall(r"^texts (.*)$", done.stdout, re.MULTILINE)
    pairs = zip(PROMPTS, json.loads(texts), strict=True)
    line = f"{GENERATE} --load CKPT THREE FIXED --num-tokens-to-generate 5 {prompts}"
    generated = start(line, ranks=3)
    first, _, rest = generated["out"][0].partition("\n")
    assert first.startswith(ON), generated
    assert rest == "".join(f"{prompt}[{text}]\n" for prompt, text in pairs)
    (total,) = json.loads(stats.read_text())["total"]
    assert (total["collective"], total["calls"] % 4) == ("one-shot", 0)
    assert total["calls"] >= 4 * 5, "a pass for the prompts and one for each token"


@pytest.mark.parametrize(
    ("line", "marked"), [("MOVED", False), ("MOVED --tokenizer-model HERE/marks", True)]
)
def test_a_moved_checkpoint_has_its_tokenizer_beside_it(start, line, marked):
    (texts,) = re.findall(r"^texts (.*)$", said(start(line)), re.MULTILINE)
    assert all(text for text in json.loads(texts))
    assert ("\u0120" in json.loads(texts)[0]) == marked, texts


def test_a_tokenizer_that_is_named_is_not_replaced(start):
    result = start("MOVED --tokenizer-model HERE/nowhere/tokenizer")
    assert result["status"] == [1]
    assert "nowhere/tokenizer" in result["err"][0]


@pytest.mark.parametrize("script", ["SCRIPT", "LAUNCH -m megatron_script"])
def test_help_has_the_group_once_and_percent_signs_do_no_harm(start, script):
    text = said(start(f"{script} --help"))
    assert text.count("low-bit tensor-parallel communication:") == 1
    assert "--lowbit-tp-comm [INDEX_DIR]" in text
    assert "something else than to generate, 100% on purpose" in text


def test_without_the_flag_it_says_native(start):
    assert said(start("ACT nothing")).count("> native communication: no --lowbit-tp-comm") == 1


def test_a_patched_tree_or_a_second_load_is_not_applied_twice(start):
    """A second call of the same hook: what a patched load_checkpoint under the launcher makes."""
    text = said(start("ACT 'load again' FIXED"))
    assert text.count(ON) == 1
    assert text.count("> low-bit communication is on already for this model") == 1


@pytest.mark.parametrize(
    ("line", "is_six"),
    [
        ("SCRIPT --own 'FLAGS FIXED --act nothing'", False),
        ("SCRIPT --own-parser 'FLAGS FIXED --act nothing'", False),
        ("ACT 'set late'", True),
    ],
)
def test_what_megatron_parsed_counts(start, line, is_six):
    """Not the launcher's own command line: as evaluation harnesses and --yaml-cfg have it."""
    text = said(start(line))
    assert text.count(ON) == 1
    assert "native communication" not in text
    assert (" 6.33 bits" in text) == is_six, "bits that are a number"


def test_a_model_whose_handle_was_removed_is_switched_on_by_its_next_load(start):
    assert said(start("ACT 'remove and load' FIXED")).count(ON) == 2


@pytest.mark.parametrize(
    ("name", "on", "native"), [("second model", 2, 0), ("second model, not loaded", 1, 1)]
)
def test_a_second_model_is_switched_on_or_said_to_be_native(start, name, on, native):
    text = said(start(f"ACT '{name}' FIXED"))
    assert text.count(ON) == on
    assert text.count("> native communication in a second model") == native


def test_a_fork_without_the_flag_ends_as_ever(start):
    result = start("HERE/fork.py --load CKPT")
    assert (result["status"], result["err"]) == ([0], [""])


NEVER_LOADED = "megatron_script.py ended without loading a checkpoint: low bits were"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("replace", "--lowbit-tp-comm was given, but is missing from Megatron's arguments"),
        ("set wrong", r"lowbit_bits: \[4, 6\] is a list: give a text"),
        ("swallow", NEVER_LOADED),
        ("no load", NEVER_LOADED),
        ("exit without load", NEVER_LOADED),
        ("other loader", "a RowParallelLinear runs before low bits are on: --lowbit-tp-comm"),
        ("other weights", "a checkpoint with other weights was loaded after low bits were"),
        ("muted", "no sync point that could use low bits.*already muted by Megatron"),
    ],
)
def test_a_script_that_low_bits_cannot_be_on_in_fails_in_one_line(start, name, message):
    refused(start(f"ACT '{name}' FIXED"), message)


UNPARSED = "is on the launcher's command line, but not among what Megatron parsed"
BAD = {  # by what is said of it; "ACT no" is no act: none gets so far
    f"--lowbit-tp-comm {UNPARSED}": "SCRIPT --own 'FLAGS --act nothing' --lowbit-tp-comm",
    f"--lowbit-bits {UNPARSED}": "SCRIPT --own 'FLAGS FIXED --act nothing' --lowbit-bits 6",
    "a RowParallelLinear runs before low bits are on": "SCRIPT --own 'FLAGS' --lowbit-tp-comm",
    "fork.py ended without loading a check.*never on": "HERE/fork.py --load CKPT --lowbit-tp-comm",
    "scrip.py: no such script": "LAUNCH HERE/scrip.py FLAGS",
    "-m megatron_lowbit.no.such: no such module": "LAUNCH -m megatron_lowbit.no.such FLAGS",
    "--lowbit-tp-comm .*: name a script, or -m and a module, before": "LAUNCH FIXED HERE/other.py",
    "other.py ended without megatron.training's arguments": "LAUNCH HERE/other.py --lowbit-tp-comm",
    "--lowbit-bits does nothing without --lowbit-tp-comm": "ACT nothing --lowbit-bits 4",
    "--lowbit-tp-comm needs --load": "SCRIPT COMMON --lowbit-tp-comm CKPT/lowbit",
    "no calibration index at .*nowhere": "ACT nothing --lowbit-tp-comm HERE/nowhere",
    "_engine needs CUDA: leave it out": "ACT no FIXED --transformer-impl transformer_engine",
    "all-gather means nothing without --sequence-parallel": "ACT no FIXED --lowbit-all-gather 6",
    "coded/tokenizer_config.json: auto_map=.* is ever run": "MOVED --tokenizer-model HERE/coded",
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(start, message):
    refused(start(BAD[message]), message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ACT nothing FIXED --lowbit-tpcomm", "unrecognized arguments: --lowbit-tpcomm"),
        ("SCRIPT --own-parser 'FLAGS FIXED --lowbit-tpcomm'", "arguments: --lowbit-tpcomm"),
        ("SCRIPT --own-parser 'FLAGS -- --lowbit-tp-comm'", "arguments: --lowbit-tp-comm"),
        ("ACT no FIXED --lowbit-bits 4 --lowbit-bits 6", "--lowbit-bits is given 2 times: give it"),
    ],
)
def test_what_the_parser_refuses_is_one_line(start, line, message):
    refused(start(line), message, status=2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MEGATRON_LM", "/nowhere", "MEGATRON_LM=/nowhere is no Megatron-LM checkout"),
        ("MASTER_ADDR", "node1", "MASTER_ADDR=node1 without RANK, WORLD_SIZE, MASTER_PORT: st"),
    ],
)
def test_a_bad_environment_is_one_line(start, name, value, message):
    refused(start("ACT nothing FIXED", **{name: value}), message)


def test_what_one_rank_meets_ends_all(start):
    result = start("ACT 'rank 1 muted' FIXED THREE", ranks=3)
    assert result["status"] == [1, 1, 1], result
    for rank in range(3):
        assert re.search("rank 0 has 4, rank 1 has 0 of the same layers", _line(result, rank))


def test_ctrl_c_ends_cleanly_and_keeps_the_statistics(start, tmp_path):
    stats = os.path.relpath(tmp_path / "stats.json")  # the script changes its directory
    result = start(f"ACT sleep FIXED --lowbit-stats {stats}", interrupt="asleep")
    assert result["status"] == [130], result
    assert _line(result) == "interrupted"
    assert json.loads((tmp_path / "stats.json").read_text())["total"] == []


def test_an_early_exit_of_the_script_keeps_the_statistics(start, tmp_path):
    stats = os.path.relpath(tmp_path / "stats.json")
    result = start(f"ACT 'early exit' FIXED --lowbit-stats {stats}")
    assert result["status"] == [0], result
    assert (tmp_path / "stats.json").exists()


@pytest.mark.parametrize("end", ["", ", sys.exit", ", os._exit"])
def test_a_full_disk_fails_the_run(start, end):
    result = start(f"ACT 'full disk{end}' FIXED --lowbit-stats HERE/full.json")
    refused(result, "No space left on device: .*full.json")


def test_a_full_disk_fails_the_run_of_several_ranks(start):
    result = start("ACT 'full disk' FIXED THREE --lowbit-stats HERE/full.json", ranks=3)
    assert result["status"] == [1, 0, 0], result
    assert "No space left on device" in _line(result)


def test_the_scripts_own_failures_stay_its_own(start):
    result = start("ACT raise FIXED")
    assert result["status"] == [1]
    assert "FileNotFoundError: what the script itself lacks" in result["err"][0]
    assert "Traceback" in result["err"][0]


@pytest.mark.parametrize(("line", "status"), [("LAUNCH --help", 0), ("LAUNCH", 2)])
def test_the_launcher_explains_itself(words, line, status):
    done = run(sys.executable, *words(line), env=_environment(), status=status)
    assert "python -m megatron_lowbit.launch SCRIPT ARGS... --lowbit-tp-comm" in done.stdout


@pytest.mark.skipif("MEGATRON_LM" not in os.environ, reason="MEGATRON_LM names no checkout")
@pytest.mark.skipif(not QUICKSTART.is_dir(), reason=f"no {QUICKSTART}: run examples/quickstart.sh")
def test_a_checkouts_own_script_gives_what_generate_py_gives(words):
    """On a real model, whose tokenizer knows all tokens: older releases cannot spell others."""
    for package in ("simpy", "six"):  # of Megatron's examples or training, in some releases
        pytest.importorskip(package)
    checkout = Path(os.environ["MEGATRON_LM"])
    (script,) = checkout.glob("examples/inference/*/gpt_static_inference.py")
    more = "--num-tokens-to-generate 10 --prompts 'The capital of France is'"
    line = f"{GENERATE} --load {QUICKSTART} FIXED {more}"
    plain = torchrun(3, *words(line), env=_environment())
    if "use_legacy_static_engine" in script.read_text():
        more = f"--use-legacy-static-engine {more}"
    load = f"--load {QUICKSTART} --use-checkpoint-args --micro-batch-size 1"
    line = f"LAUNCH {script} {load} THREE FIXED {more}"
    done = torchrun(3, *words(line), env=_environment(), timeout=500)
    assert done.stdout.count("> low-bit communication: 60 sync points use") == 1
    (text,) = re.findall(r"The capital of France is \.\.\. (.*)", done.stdout)
    expected = plain.stdout.partition("The capital of France is[")[2].rstrip("]\n")
    assert text == expected.replace("\n", "\\n")
