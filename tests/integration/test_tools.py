"""The command lines as users run them: torchrun, a real (tiny) checkpoint, and what goes wrong.

One checkpoint and one index serve all tests (conftest.py). A run under torchrun costs 10-15 s on 2
cores: each tool has one, and what differs from it by arguments only is forked (forks.py).
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from damaged_models import ask_for_code
from forks import forked
from releases import ROOT, environment, run, torchrun

from megatron_lowbit.calibration.index_files import read_index, write_index
from megatron_lowbit.evaluation.evaluation_schema import Evaluation

TEXT = ROOT / "examples" / "data" / "persuasion.txt"
OTHER = TEXT.with_name("kjv.txt")
CALIBRATE = ROOT / "tools" / "calibrate.py"
EVALUATE = ROOT / "tools" / "evaluate.py"
DOCTOR = ROOT / "tools" / "doctor.py"
GENERATE = ROOT / "examples" / "generate.py"
SMALL = ["--sequences", "4", "--seq-length", "16"]


def _errors(done: subprocess.CompletedProcess) -> list[str]:
    """Our own one-line errors, a rank each, without what torchrun adds."""
    return re.findall(r"^\w+\.py: \[rank \d\] error: (.*)$", done.stderr, re.MULTILINE)


def _simulated(script: Path, ranks: int, load: Path, *more, **settings):
    """A tool in one process that stands for several ranks, on `TEXT`."""
    command = [script, "--simulate-tp", ranks, "--load", load, "--data", TEXT, *more]
    return forked(None, *command, **settings)


def test_calibration_writes_a_whole_index_and_nothing_else(calibrated):
    index = read_index(calibrated / "lowbit")
    assert sorted(index.layers) == [1, 2]
    assert index.tp_size == 3
    recipe = index.manifest["recipe"]
    assert (recipe["budget"], len(index.recipe)) == (4, 4)
    assert 3 < recipe["bits_per_value"] <= 4
    for options in index.options().values():
        costs = {o.assignment.bits: o.divergence for o in options if not o.assignment.bf16_features}
        assert costs[2] > costs[3] > costs[4] > costs[5] > costs[6] > costs[16] > 0
    corpus = index.manifest["corpus"]
    assert (corpus["files"], corpus["sequences"], corpus["seq_length"]) == ([TEXT.name], 4, 16)
    assert not [path.name for path in calibrated.iterdir() if path.name.startswith(".")]


CODECS = "bf16,int4,int4-random,static-hybrid,rotated-hybrid,rotated-hybrid-2,rotated-hybrid-4+6"
CODECS += ",shaped-hybrid,recipe,recipe-3,recipe@two-shot"
SHORT = ["--tokens", "100", "--seq-length", "32", "--codecs", CODECS, "--data", TEXT, OTHER]


@pytest.fixture(scope="module")
def evaluated(calibrated, tmp_path_factory) -> tuple[str, dict]:
    """What an evaluation at TP 3 printed and wrote."""
    output = tmp_path_factory.mktemp("evaluated") / "new" / "summary.json"
    done = forked(3, EVALUATE, "--load", calibrated, "--output", output, *SHORT)
    assert [path.name for path in output.parent.iterdir()] == ["summary.json"]
    return done.stdout, json.loads(output.read_text())


def test_evaluation_prints_and_writes_the_tables(evaluated):
    printed, summary = evaluated
    assert (summary["format"], summary["tp_size"], summary["simulated"]) == (3, 3, False)
    assert [text["name"] for text in summary["texts"]] == [TEXT.name, OTHER.name]
    assert [text["tokens"] for text in summary["texts"]] == [128, 128]
    names = CODECS.split(",")
    variants = {variant["variant"]: variant for variant in summary["variants"]}
    assert list(variants) == names
    for name, variant in variants.items():
        assert len(re.findall(rf"^\| {re.escape(name)} ", printed, re.MULTILINE)) == 2
        two_shot = name in ("rotated-hybrid-4+6", "recipe@two-shot")
        assert variant["collective"] == ("two-shot" if two_shot else "one-shot")
        if not two_shot:
            sent = 2 * 4 * 48 * variant["bits_per_value"] / 8
            assert variant["wire_bytes_per_token"] == sent
    assert variants["bf16"]["bits_per_value"] == 16
    assert variants["int4"]["bits_per_value"] == 4
    assert 3.3 < variants["recipe"]["bits_per_value"] <= 4
    assert 2.3 < variants["recipe-3"]["bits_per_value"] <= 3
    assert summary["native"]["wire_bytes_per_token"] == 4 * 2 * 48 * 2 * 2 / 3
    for text in summary["texts"]:
        kl = {result["variant"]: result["kl"] for result in text["results"]}
        assert list(kl) == names
        assert 0 < kl["bf16"] < kl["rotated-hybrid"] < kl["rotated-hybrid-2"], kl
        assert kl["recipe"] < kl["recipe-3"], kl
    assert summary["tasks"] == summary["long_context"] == summary["generation"] == []


def test_evaluation_measures_every_sync_point(evaluated):
    printed, summary = evaluated
    points = summary["sync_points"]["points"]
    assert summary["sync_points"]["sequences"] == 4
    assert [(p["layer"], p["name"]) for p in points] == [
        (layer, name)
        for layer in (1, 2)
        for name in ("self_attention.linear_proj", "mlp.linear_fc2")
    ]
    for point in points:
        sqnr = point["sqnr"]
        assert list(sqnr) == CODECS.split(",")
        assert sqnr["bf16"] > 45, "BF16 rounding of the sum is all that is lost"
        assert sqnr["bf16"] > sqnr["rotated-hybrid"] > sqnr["rotated-hybrid-2"] > 3
        assert sqnr["rotated-hybrid"] > sqnr["rotated-hybrid-4+6"] > sqnr["rotated-hybrid-2"]
        for name, value in point["worst_token_sqnr"].items():
            assert value < sqnr[name]
    assert re.search(
        r"^largest errors at sync points: rotated-hybrid-2: layer ", printed, re.MULTILINE
    )
    assert "largest errors at sync points: bf16" not in printed


def test_simulated_evaluation_agrees_with_a_real_one(calibrated, evaluated, tmp_path):
    """The codecs' logits are the same bit for bit; what is computed from them is not quite."""
    output = tmp_path / "summary.json"
    command = [EVALUATE, "--simulate-tp", "3", "--load", calibrated, "--output", output, *SHORT]
    done = forked(None, *command)
    assert "TP 3, simulated, 128 tokens of persuasion.txt" in done.stdout
    got, (_, real) = json.loads(output.read_text()), evaluated
    assert got["simulated"] is True
    for key in ("tp_size", "variants", "native", "index_sha256"):
        assert got[key] == real[key]
    for mine, theirs in zip(got["texts"], real["texts"], strict=True):
        for one, other in zip(mine["results"], theirs["results"], strict=True):
            assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
        assert mine["results"][0]["kl"] == 0, "native is codec bf16 here"


def _start(command: list, is_under_way: Callable[[], bool]) -> subprocess.Popen:
    """Start Python in its own session and wait until its work is under way."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not is_under_way():
        assert process.poll() is None, process.stdout.read()[-4000:]
        assert time.monotonic() < deadline, "nothing after two minutes"
        time.sleep(0.02)
    return process


def test_a_killed_evaluation_is_resumed_to_the_same_bytes(calibrated, tmp_path):
    """SIGKILL among the needles; going on as two data-parallel ranks."""
    arguments = ["--simulate-tp", "6", "--load", calibrated, "--data", TEXT, OTHER]
    arguments += ["--tokens", "100", "--seq-length", "32", "--codecs", "bf16,rotated-hybrid-4+4"]
    arguments += ["--tasks", "arc-easy,winogrande", "--long-context", "1024", "--generate", "3"]
    output, straight = tmp_path / "summary.json", tmp_path / "straight.json"
    partial = tmp_path / ".summary.json.partial"
    part = partial / "part0.jsonl"
    process = _start(
        [EVALUATE, "--output", output, *arguments, "--limit", "4"],
        lambda: part.exists() and b'"needles' in part.read_bytes(),
    )
    process.kill()
    process.wait(timeout=60)
    assert sorted(p.name for p in partial.iterdir()) == ["identity.json", "part0.jsonl"]
    assert not output.exists()
    with part.open("a") as file:
        file.write('{"measure": "text pers')  # as a full disk or a lost machine leaves it

    asked = ["--limit", "5", "--generate", "4", "--fp32"]
    resume = ["--output", output, "--resume"]
    (error,) = _errors(forked(1, EVALUATE, *arguments, *resume, *asked, status=1))
    assert "another evaluation (dtype: torch.bfloat16 there, torch.float32 here" in error
    assert "task winogrande items: 4 there, 5 here" in error
    assert "generation from persuasion.txt new_tokens: 3 there, 4 here" in error
    assert "run without --resume" in error

    arguments += ["--limit", "4"]
    resumed = forked(2, EVALUATE, *arguments, *resume)
    assert re.search(r"going on after \d+ of 42 units", resumed.stdout)
    assert not partial.exists()
    forked(1, EVALUATE, *arguments, "--output", straight)
    assert output.read_bytes() == straight.read_bytes()
    content = json.loads(output.read_text())
    assert all(content.values()), "every section has something"
    assert Evaluation.model_validate(content).model_dump(by_alias=True) == content, "one schema"


def test_simulated_calibration_serves_static_ranges_at_its_size(checkpoint, tmp_path):
    index = tmp_path / "index"
    _simulated(CALIBRATE, 4, checkpoint, *SMALL, "--output", index)
    assert read_index(index).tp_size == 4
    assert read_index(index).record(1, "mlp.linear_fc2").minimum.shape == (4, 48)
    short = ["--tokens", "64", "--seq-length", "32", "--codecs", "static-hybrid-4+6"]
    done = _simulated(EVALUATE, 4, checkpoint, "--index", index, *short)
    assert "ckpt, TP 4, simulated, 64 tokens" in done.stdout


def test_an_evaluation_without_a_list_measures_what_is_served(calibrated, tmp_path):
    output = tmp_path / "summary.json"
    short = ["--tokens", "32", "--seq-length", "32", "--output", output]
    _simulated(EVALUATE, 3, calibrated, *short)
    measured = [variant["variant"] for variant in json.loads(output.read_text())["variants"]]
    assert measured[-3:] == ["recipe", "recipe@feedback", "recipe@feedback@two-shot"]


def test_a_text_that_is_too_poor_is_said_in_one_line(checkpoint, tmp_path):
    text = tmp_path / "the.txt"
    text.write_text("the " * 2000)
    command = ["--simulate-tp", "4", "--load", checkpoint, "--data", text, *SMALL]
    done = forked(None, CALIBRATE, *command, "--output", tmp_path / "index")
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "different tokens in" in warnings[0]
    assert "calibrate on a more varied one" in warnings[0]
    assert read_index(tmp_path / "index").tp_size == 4


def test_an_index_serves_another_size_where_the_codec_allows_it(calibrated, tmp_path):
    """Calibrated at 3, used at 2: tables that belong to ranks are refused, others work."""
    output = tmp_path / "summary.json"
    short = ["--tokens", "64", "--seq-length", "32", "--output", output, "--codecs"]
    codecs = "shaped-hybrid,rotated-hybrid-2"
    _simulated(EVALUATE, 2, calibrated, *short, codecs)
    done = _simulated(EVALUATE, 2, calibrated, *short, f"{codecs},static-hybrid", status=1)
    (line,) = done.stderr.splitlines()
    assert "size 3, this run has 2: static-hybrid has tables per rank, calibrate at 2" in line
    summary = json.loads(output.read_text())
    kl = {result["variant"]: result["kl"] for result in summary["texts"][0]["results"]}
    assert summary["tp_size"] == 2
    assert 0 < kl["shaped-hybrid"] < kl["rotated-hybrid-2"], kl


def test_another_chain_is_refused_for_variants_that_carry_only(calibrated, tmp_path):
    index = read_index(calibrated / "lowbit")
    chain = {**index.manifest["chain"], "layer 2 mlp.linear_fc2": "its own norm"}
    index.manifest["chain"] = chain
    write_index(index, tmp_path / "index")
    short = ["--index", tmp_path / "index", "--tokens", "64", "--seq-length", "32"]
    for variant, status in (("shaped-hybrid", 0), ("shaped-hybrid@feedback", 1)):
        done = _simulated(EVALUATE, 3, calibrated, *short, "--codecs", variant, status=status)
    assert "layer 2 mlp.linear_fc2 is in the chain here, and outside of it" in done.stderr


def test_generation_with_and_without_the_flag(calibrated, tmp_path):
    (tmp_path / "prompts.txt").write_text("a model of\n\nthe quick\n")
    prompts = ["--prompt-file", tmp_path / "prompts.txt", "--prompts", "the world"]
    common = ["--load", calibrated, "--num-tokens-to-generate", "5", *prompts]
    plain = forked(3, GENERATE, *common)
    assert plain.stdout.startswith("> native communication\nthe world[")
    stats = tmp_path / "stats.json"
    flags = ["--lowbit-bits", "3,6", "--lowbit-collective", "two-shot", "--lowbit-stats", stats]
    low = torchrun(3, GENERATE, *common, "--lowbit-tp-comm", *flags)
    first, *texts = low.stdout.splitlines()
    assert first.startswith("> low-bit communication: 4 sync points use shaped-hybrid, 0 of 48")
    assert "3.33 bits a value (6.33 for sums)" in first
    assert (
        "(one codec, the calibration index's recipe set aside), two-shot over 3 ranks; err" in first
    )
    assert first.endswith("; 0 stay native")
    (total,) = json.loads(stats.read_text())["total"]
    assert (total["collective"], total["why"]) == ("two-shot", "fixed")
    assert total["calls"] % 4 == 0
    assert total["calls"] >= 4 * 5, "a pass for the prompts and one for each token"
    assert total["sent_bytes"] > 0
    assert sum(line.startswith(("the world[", "a model of[", "the quick[")) for line in texts) == 3


def test_the_doctor_writes_a_tuning_file_that_generation_takes(calibrated, tmp_path):
    tuning = tmp_path / "new" / "tuning.json"
    done = forked(3, DOCTOR, "--load", calibrated, "--seconds", "1", "--output", tuning)
    for said in (
        r"^ranks    3, gloo on ",
        r"^model    4 sync points use shaped-hybrid, .* \(the calibration index's recipe\)$",
        r"^bits     as in plain torch, .*: one-shot and two-shot by \d codecs?, carries included$",
        r"^layer 1: self_attention.linear_proj shaped-hybrid \(\d bits\)",
        r"^time to first token, \d+ tokens: .* in native sums, ",
        r"^(flags:  --lowbit-tp-comm --lowbit-tuning .*tuning.json|Leave low bits off here: )",
    ):
        assert re.search(said, done.stdout, re.MULTILINE), (said, done.stdout)
    assert [path.name for path in tuning.parent.iterdir()] == ["tuning.json"]
    times = json.loads(tuning.read_text())["times"]
    assert {entry["carries"] for entry in times if entry["codec"]} == {True}
    low_bits = ["--lowbit-tp-comm", "--lowbit-tuning", tuning]
    done = forked(3, GENERATE, "--load", calibrated, "--prompts", "the", *low_bits)
    assert "auto over 3 ranks (by tuning.json: " in done.stdout


def test_the_doctor_without_an_index_says_what_to_do(checkpoint, tmp_path):
    output = tmp_path / "tuning.json"
    done = forked(3, DOCTOR, "--load", checkpoint, "--seconds", "1", "--output", output)
    assert "no calibration index: as if all had rotated-hybrid (4 bits)" in done.stdout
    assert not output.exists()


def _command(script: Path, checkpoint: Path, *arguments: str) -> list:
    """A command line with what the script cannot be without."""
    own = ["--prompts", "a"] if script == GENERATE else ["--data", TEXT]
    return [script, "--load", checkpoint, *own, *arguments]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (GENERATE, ["--lowbit-tp-comm"], "no calibration index at .*lowbit .*lowbit calibrate"),
        (CALIBRATE, ["--codec", "mp3"], "unknown codec 'mp3'"),
        (EVALUATE, ["--resume"], "--resume needs --output"),
    ],
)
def test_a_wrong_flag_in_an_interpreter_of_its_own(checkpoint, script, arguments, message):
    """One process as torchrun would start it: nothing is distributed yet when these are found."""
    command = _command(script, checkpoint, *arguments)
    done = run(sys.executable, *command, env={**environment(), "RANK": "0"}, status=1)
    _check_one_line(done, message)


def _check_one_line(done: subprocess.CompletedProcess, message: str) -> None:
    assert re.search(message, _errors(done)[0])
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (GENERATE, ["--lowbit-codec", "bf16"], "--lowbit-codec does nothing without"),
        (GENERATE, ["--lowbit-tp-comm", "--lowbit-codec", "mp3"], "unknown codec 'mp3'"),
        (GENERATE, ["--lowbit-tp-comm", "--lowbit-codec", "bf16", "--lowbit-bits", "4"], "4-bit"),
        (GENERATE, ["--lowbit-tp-comm", "--lowbit-recipe", "no.json"], "cannot read no.json"),
        (GENERATE, ["--top_p", "0.9"], "--top_p 0.9 and --top_k 1 exclude each other: add --top_k"),
        (GENERATE, ["--top_p", "1.5", "--top_k", "0"], "--top_p 1.5: give 0 to 1"),
        (GENERATE, ["--top_k", "-1"], "--top_k -1: give 1 or more, or 0 for off"),
        (
            GENERATE,
            ["--top_k", "5000", "--tensor-model-parallel-size", "1"],
            "--top_k 5000 is not below the vocabulary's 1152",
        ),
        (CALIBRATE, ["--codec", "bf16", "--budget", "4"], "a recipe chooses codec and BF16"),
        (CALIBRATE, ["--simulate-tp", "2", "--budget", "1"], "--budget 1 is below what .* 1.33 or"),
        (CALIBRATE, ["--simulate-tp", "1", "--target-loss", "1"], "a recipe needs ranks"),
        (EVALUATE, ["--codecs", "bf16,rotated-hybrid-9"], "has no 9-bit version"),
        (EVALUATE, ["--data", str(TEXT), str(TEXT)], "a file is named twice"),
        (
            EVALUATE,
            ["--simulate-tp", "8", "--tensor-model-parallel-size", "8"],
            "--tensor-model-parallel-size with --simulate-tp 8: leave it out",
        ),
        *(
            (script, [f"--{kind}-parallel-size", size], f"--{kind}-parallel-size {size}: give 1 or")
            for script, kind, size in [
                (CALIBRATE, "tensor-model", "0"),
                (CALIBRATE, "pipeline-model", "0"),
                (EVALUATE, "pipeline-model", "-2"),
                (EVALUATE, "context", "0"),
                (CALIBRATE, "expert-model", "-1"),
                (CALIBRATE, "expert-tensor", "0"),
            ]
        ),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(checkpoint, script, arguments, message):
    command = _command(script, checkpoint, *arguments)
    env = {**environment(), "RANK": "0", "WORLD_SIZE": "1"}
    _check_one_line(forked(None, *command, env=env, status=1), message)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (CALIBRATE, ["--data", "EMPTY"], "empty.txt is empty"),
        (CALIBRATE, ["--data", TEXT, "--sequences", "9999999"], "too short: .* 9999999 were asked"),
        (EVALUATE, ["--data", TEXT, "--index", "EMPTY"], "no calibration index at"),
        (CALIBRATE, ["--data", TEXT, "--simulate-tp", "5"], "5 does not divide the 48 inputs of"),
        (CALIBRATE, ["--data", TEXT, "--bf16-features", "7.5"], "not within 0 and the hidden size"),
        (CALIBRATE, ["--data", TEXT, *SMALL, "--budget", "1"], "below what the codecs can do here"),
        (DOCTOR, ["--seconds", "1", "--output", "/proc/t.json"], "/proc/t.json cannot be written"),
    ],
)
def test_wrong_input_is_one_line_on_every_rank(checkpoint, tmp_path, script, arguments, message):
    (tmp_path / "empty.txt").touch()
    arguments = [tmp_path / "empty.txt" if a == "EMPTY" else a for a in arguments]
    done = forked(3, script, "--load", checkpoint, *arguments, status=1)
    errors = _errors(done)
    assert len(errors) == 3, done.stderr[-4000:]
    assert all(re.search(message, error) for error in errors), errors
    assert "megatron_lowbit/" not in done.stderr, "a traceback of ours"
    assert sorted(p.name for p in checkpoint.iterdir() if "lowbit" in p.name) == []


@pytest.fixture
def tokenizer(checkpoint, tmp_path) -> Callable[..., Path]:
    """Makes another tokenizer of the checkpoint's, with new tokens up to a number of them."""

    def make(tokens: int, *special: str) -> Path:
        target = tmp_path / "tokenizer"
        shutil.copytree(checkpoint / "tokenizer", target)
        content = json.loads((target / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary.update({f"new{n}": n for n in range(len(vocabulary), tokens)})
        (eos,) = content["added_tokens"]
        new = [{**eos, "id": tokens + n, "content": text} for n, text in enumerate(special)]
        content["added_tokens"] += new
        (target / "tokenizer.json").write_text(json.dumps(content))
        return target

    return make


@pytest.mark.parametrize("script", [GENERATE, CALIBRATE, EVALUATE])
def test_a_tokenizer_with_more_tokens_than_the_model_is_one_line(
    checkpoint, calibrated, tokenizer, script
):
    load = checkpoint if script == CALIBRATE else calibrated
    command = _command(script, load, "--tokenizer-model", str(tokenizer(1300)))
    done = forked(3, *command, status=1)
    message = "tokenizer: it has tokens up to 1299, the checkpoint's vocabulary ends at 999"
    assert [message in error for error in _errors(done)] == [True] * 3, done.stderr[-4000:]
    assert len(done.stderr.splitlines()) == 3, done.stderr


def test_a_special_token_that_the_model_does_not_know_is_one_line_where_it_is_used(
    checkpoint, tokenizer
):
    named = ["--tokenizer-model", tokenizer(1000, "<new>"), "--tensor-model-parallel-size", "1"]
    command = [GENERATE, "--load", checkpoint, *named, "--num-tokens-to-generate", "2"]
    forked(None, *command, "--prompts", "the world")
    done = forked(None, *command, "--prompts", "the world <new>", status=1)
    (line,) = done.stderr.splitlines()
    assert "gives token 1000 for a text, the checkpoint's vocabulary ends at 999" in line


def test_code_of_a_tokenizer_is_not_run(checkpoint, tmp_path):
    target = tmp_path / "ckpt"
    shutil.copytree(checkpoint, target)
    ask_for_code(target / "tokenizer", "tokenizer_config.json")
    command = [GENERATE, "--load", target, "--prompts", "a", "--tensor-model-parallel-size", "1"]
    for flags, said in (
        (["--tokenizer-model", target / "tokenizer"], "no code of a model is ever run"),
        (["--trust-remote-code"], "--trust-remote-code: no code of a model"),
    ):
        (line,) = forked(None, *command, *flags, status=1).stderr.splitlines()
        assert said in line
    assert not list(target.rglob("ran"))


@pytest.mark.parametrize("damage", ["truncated", "no metadata"])
def test_a_damaged_checkpoint_is_one_line(checkpoint, tmp_path, damage):
    target = tmp_path / "ckpt"
    shutil.copytree(checkpoint, target)
    if damage == "truncated":
        shard = next((target / "release").glob("*.distcp"))
        os.truncate(shard, shard.stat().st_size // 3)
    else:
        (target / "release" / ".metadata").unlink()
    command = [GENERATE, "--load", target, "--prompts", "a"]
    done = forked(None, *command, "--tensor-model-parallel-size", "1", status=1)
    (line,) = done.stderr.splitlines()
    assert re.match(f"generate.py: error: --load {target}: .*checkpoint", line), line


def test_tp_size_that_does_not_divide_the_heads(checkpoint):
    arguments = ["--data", TEXT, "--tensor-model-parallel-size", "2"]
    errors = _errors(forked(2, CALIBRATE, "--load", checkpoint, *arguments, status=1))
    assert errors and all("2 does not divide 3 query groups" in error for error in errors)


def _start_long_calibration(target: Path, *more: str) -> subprocess.Popen:
    """Start a calibration in its own session and wait until it has saved a state."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command += [CALIBRATE, "--load", target, "--data", TEXT, *more]
    return _start(command, (target / ".lowbit.partial" / "progress.json").exists)


def test_a_dead_rank_stops_the_others_and_resume_goes_on(checkpoint, tmp_path):
    target, whole = tmp_path / "ckpt", tmp_path / "whole"
    shutil.copytree(checkpoint, target)
    shutil.copytree(checkpoint, whole)
    length = ["--sequences", "128", "--seq-length", "16"]
    process = _start_long_calibration(target, *length)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    ranks = [int(child) for child in children.split()]
    os.kill(ranks[1], signal.SIGKILL)
    process.wait(timeout=60)  # the minute
    assert process.returncode != 0
    output = process.stdout.read()
    assert "megatron_lowbit/" not in output, "a traceback of ours"
    assert re.search(r"\[rank \d\] (error: stopped, since another rank|interrupted)", output)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert not (target / "lowbit").exists()

    resumed = forked(3, CALIBRATE, "--load", target, "--data", TEXT, *length, "--resume")
    assert re.search(r"going on after \d+ sequences", resumed.stdout)
    assert not (target / ".lowbit.partial").exists()
    forked(3, CALIBRATE, "--load", whole, "--data", TEXT, *length)
    for layer in ("layer_00001", "layer_00002"):
        files = [(d / "lowbit" / f"{layer}.safetensors").read_bytes() for d in (target, whole)]
        assert files[0] == files[1], "a resumed calibration gives the same bytes"


def test_ctrl_c_leaves_no_index(checkpoint, tmp_path):
    target = tmp_path / "ckpt"
    shutil.copytree(checkpoint, target)
    process = _start_long_calibration(target, "--sequences", "4000", "--seq-length", "16")
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=60)
    assert process.returncode != 0
    left = sorted(p.name for p in target.iterdir() if "lowbit" in p.name)
    assert left == [".lowbit.partial"], "only what --resume reads"
