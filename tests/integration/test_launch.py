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
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import ask
from releases import ROOT, environment, torchrun

SCRIPT = Path(__file__).with_name("megatron_script.py")
GENERATE = ROOT / "examples" / "generate.py"
LAUNCH = ["-m", "megatron_lowbit.launch"]
QUICKSTART = Path(os.environ.get("QUICKSTART_CKPT", ROOT / "out" / "quickstart" / "ckpt"))
PROMPTS = ["the world", "a model of"]
# What convert_hf.py prints for the checkpoint, at TP 3, and a fixed collective.
COMMON = ["--use-checkpoint-args", "--ckpt-format", "torch_dist", "--norm-epsilon", "3e-05"]
THREE = ["--tensor-model-parallel-size", "3", "--bf16"]
FIXED = ["--lowbit-tp-comm", "--lowbit-collective", "one-shot"]
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
    env = environment("0.19.2")
    env.pop("MEGATRON_LM", None)
    env["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    return env


@pytest.fixture(scope="module")
def flags(calibrated) -> list[str]:
    """The arguments that load the checkpoint, as its own print of them has them."""
    return ["--load", str(calibrated), *COMMON]


def _case(argv: list, *, ranks: int | None = None, interrupt="", **env: str) -> dict:
    env = {**_environment(), "CUDA_DEVICE_MAX_CONNECTIONS": "1", **env}
    argv = [*LAUNCH, *argv]
    return {"argv": argv, "ranks": ranks, "interrupt": interrupt, "env": env, "timeout": 120}


def _cases(flags: list[str], directory: Path) -> dict[str, dict]:
    """Command lines by name: what `forks.ask` takes."""

    moved, broken, coded = _moved(Path(flags[1]), directory)
    one = ["--tensor-model-parallel-size", "1"]

    def run(load: Path, *more) -> dict:
        return _case([SCRIPT, "--load", load, *COMMON, *one, *more])

    def act(name: str, *more: str, **settings) -> dict:
        return _case([SCRIPT, *flags, "--act", name, *more], **settings)

    (directory / "other.py").write_text("import sys\nprint('done', sys.argv[1:])\n")

    def own(words: list[str], *more: str, kind="--own") -> dict:
        return _case([SCRIPT, kind, shlex.join([*flags, *words]), *more])

    def full(*more: str, end="", **settings) -> dict:
        stats = ["--lowbit-stats", str(directory / "full.json")]
        return act("full disk" + end, *FIXED, *stats, *more, **settings)

    (directory / "fork.py").write_text(FORK)
    fork = {**_case([]), "argv": [directory / "fork.py", "--load", flags[1]]}
    nowhere = str(directory / "nowhere")
    stats = ["--lowbit-stats", os.path.relpath(directory / "interrupted.json")]
    early = os.path.relpath(directory / "early.json")  # of scripts that change their directory
    generate = ["--load", flags[1], *THREE, *FIXED, "--num-tokens-to-generate", "5"]
    return {
        "generate": {**_case([], ranks=3), "argv": [GENERATE, *generate, "--prompts", *PROMPTS]},
        "moved": run(moved),
        "moved, another tokenizer": run(moved, "--tokenizer-model", broken),
        "moved, no tokenizer": run(moved, "--tokenizer-model", nowhere + "/tokenizer"),
        "code of a tokenizer": run(moved, "--tokenizer-model", coded),
        "help": _case([SCRIPT, "--help"]),
        "native": act("nothing"),
        "no load": act("no load", *FIXED),
        "exit without load": act("exit without load", *FIXED),
        "early exit": act("early exit", *FIXED, "--lowbit-stats", early),
        "muted": act("muted", *FIXED),
        "rank 1 muted": act("rank 1 muted", *FIXED, *THREE, ranks=3),
        "load again": act("load again", *FIXED),
        "remove and load": act("remove and load", *FIXED),
        "second model": act("second model", *FIXED),
        "second model, not loaded": act("second model, not loaded", *FIXED),
        "other weights": act("other weights", *FIXED),
        "own list": own([*FIXED, "--act", "nothing"]),
        "own parser": own([*FIXED, "--act", "nothing"], kind="--own-parser"),
        "own list without it": own(["--act", "nothing"], "--lowbit-tp-comm"),
        "own list without it, used": own([], "--lowbit-tp-comm"),
        "own list without bits": own([*FIXED, "--act", "nothing"], "--lowbit-bits", "6"),
        "own parser, typo": own([*FIXED, "--lowbit-tpcomm"], kind="--own-parser"),
        "after --": own(["--act", "nothing", "--", "--lowbit-tp-comm"], kind="--own-parser"),
        "twice": act("nothing", *FIXED, "--lowbit-bits", "4", "--lowbit-bits", "6"),
        "replace": act("replace", *FIXED),
        "set late": act("set late"),
        "set wrong": act("set wrong", *FIXED),
        "swallow": act("swallow", *FIXED),
        "other loader": act("other loader", *FIXED),
        "full disk": full(),
        "full disk, sys.exit": full(end=", sys.exit"),
        "full disk, os._exit": full(end=", os._exit"),
        "full disk, 3 ranks": full(*THREE, ranks=3),
        "fork": fork,
        "fork with it": {**fork, "argv": [*fork["argv"], "--lowbit-tp-comm"]},
        "raise": act("raise", *FIXED),
        "interrupt": act("sleep", *FIXED, *stats, interrupt="asleep"),
        "typo": _case([SCRIPT.with_name("megatron_scrip.py"), *flags]),
        "module typo": _case(["-m", "megatron_lowbit.no.such", *flags]),
        "module": _case(["-m", "megatron_script", "--help"]),
        "no script": _case(["--lowbit-tp-comm", SCRIPT]),
        "no checkout": _case([SCRIPT, *flags], MEGATRON_LM=nowhere),
        "no megatron.training": _case([directory / "other.py", "--lowbit-tp-comm"]),
        "without the flag": act("nothing", "--lowbit-bits", "4"),
        "without --load": _case([SCRIPT, *COMMON, "--lowbit-tp-comm", str(flags[1]) + "/lowbit"]),
        "no index": act("nothing", "--lowbit-tp-comm", nowhere),
        "unknown argument": act("nothing", *FIXED, "--lowbit-tpcomm"),
        "needs CUDA": act("nothing", *FIXED, "--transformer-impl", "transformer_engine"),
        "half an environment": act("nothing", *FIXED, MASTER_ADDR="node1"),
        "no sequence": act("nothing", *FIXED, "--lowbit-all-gather", "6"),
    }


def _moved(checkpoint: Path, directory: Path) -> tuple[Path, Path, Path]:
    """The checkpoint after a move; a tokenizer that leaves its marks of spaces; one with code."""
    moved, marks, coded = (directory / name for name in ("moved", "marks", "coded"))
    shutil.copytree(checkpoint, moved)
    common = torch.load(moved / "release" / "common.pt", weights_only=False)
    common["args"].tokenizer_model = str(directory / "where" / "it" / "was")
    torch.save(common, moved / "release" / "common.pt")
    for target in (marks, coded):
        shutil.copytree(checkpoint / "tokenizer", target)
    content = json.loads((marks / "tokenizer.json").read_text())
    (marks / "tokenizer.json").write_text(json.dumps({**content, "decoder": None}))
    settings = {"auto_map": {"AutoTokenizer": [None, "evil.T"]}, "tokenizer_class": "T"}
    (coded / "tokenizer_config.json").write_text(json.dumps(settings))
    return moved, marks, coded


@pytest.fixture(scope="module")
def ran(flags, tmp_path_factory) -> dict[str, dict]:
    """What each of `_cases` ended with."""
    directory = tmp_path_factory.mktemp("launched")
    results = {name: ask(**case) for name, case in _cases(flags, directory).items()}
    return {**results, "directory": directory}


def _line(result: dict, rank: int = 0) -> str:
    """The launcher's own error, which must be one line."""
    (line,) = re.findall(
        r"(?:launch|megatron_script|fork).py: (.*)$", result["err"][rank], re.MULTILINE
    )
    assert "Traceback" not in result["err"][rank], result["err"][rank]
    return line


def test_a_script_gives_what_generate_py_gives(flags, ran, tmp_path):
    stats = tmp_path / "stats.json"
    script = [*LAUNCH, SCRIPT, *flags, *THREE, *FIXED, "--lowbit-stats", stats]
    done = torchrun(3, *script, "--prompts", *PROMPTS, env=_environment())
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("low-bit communication") == done.stdout.count(ON) == 1
    assert re.search("> no CUDA here, so: .*transformer_impl=local", done.stdout)
    (texts,) = re.findall(r"^texts (.*)$", done.stdout, re.MULTILINE)
    pairs = zip(PROMPTS, json.loads(texts), strict=True)
    first, _, rest = ran["generate"]["out"][0].partition("\n")
    assert first.startswith(ON), ran["generate"]
    assert rest == "".join(f"{prompt}[{text}]\n" for prompt, text in pairs)
    (total,) = json.loads(stats.read_text())["total"]
    assert (total["collective"], total["calls"] % 4) == ("one-shot", 0)
    assert total["calls"] >= 4 * 5, "a pass for the prompts and one for each token"


def test_a_moved_checkpoint_has_its_tokenizer_beside_it(ran):
    for name, marked in (("moved", False), ("moved, another tokenizer", True)):
        assert ran[name]["status"] == [0], ran[name]
        (texts,) = re.findall(r"^texts (.*)$", ran[name]["out"][0], re.MULTILINE)
        assert all(text for text in json.loads(texts))
        assert ("\u0120" in json.loads(texts)[0]) == marked, texts


def test_a_tokenizer_that_is_named_is_not_replaced(ran):
    assert ran["moved, no tokenizer"]["status"] == [1]
    assert "nowhere/tokenizer" in ran["moved, no tokenizer"]["err"][0]


@pytest.mark.parametrize("how", ["help", "module"])
def test_help_has_the_group_once_and_percent_signs_do_no_harm(ran, how):
    assert ran[how]["status"] == [0], ran[how]
    (text,) = ran[how]["out"]
    assert text.count("low-bit tensor-parallel communication:") == 1
    assert "--lowbit-tp-comm [INDEX_DIR]" in text
    assert "something else than to generate, 100% on purpose" in text


def test_without_the_flag_it_says_native(ran):
    assert ran["native"]["status"] == [0], ran["native"]
    assert ran["native"]["out"][0].count("> native communication: no --lowbit-tp-comm") == 1


def test_a_patched_tree_or_a_second_load_is_not_applied_twice(ran):
    """A second call of the same hook: what a patched load_checkpoint under the launcher makes."""
    result = ran["load again"]
    assert result["status"] == [0], result
    assert result["out"][0].count(ON) == 1
    assert result["out"][0].count("> low-bit communication is on already for this model") == 1


@pytest.mark.parametrize("name", ["own list", "own parser", "set late"])
def test_what_megatron_parsed_counts(ran, name):
    """Not the launcher's own command line: as evaluation harnesses and --yaml-cfg have it."""
    assert ran[name]["status"] == [0], ran[name]
    assert ran[name]["out"][0].count(ON) == 1
    assert "native communication" not in ran[name]["out"][0]
    assert (" 6.33 bits" in ran[name]["out"][0]) == (name == "set late"), "bits that are a number"


def test_a_model_whose_handle_was_removed_is_switched_on_by_its_next_load(ran):
    assert ran["remove and load"]["status"] == [0], ran["remove and load"]
    assert ran["remove and load"]["out"][0].count(ON) == 2


def test_a_second_model_is_switched_on_or_said_to_be_native(ran):
    loaded, other = ran["second model"], ran["second model, not loaded"]
    assert (loaded["status"], other["status"]) == ([0], [0]), (loaded, other)
    assert (loaded["out"][0].count(ON), other["out"][0].count(ON)) == (2, 1)
    said = "> native communication in a second model"
    assert (loaded["out"][0].count(said), other["out"][0].count(said)) == (0, 1)


def test_a_fork_without_the_flag_ends_as_ever(ran):
    assert (ran["fork"]["status"], ran["fork"]["err"]) == ([0], [""])


_UNPARSED = "is on the launcher's command line, but not among what Megatron parsed"


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("code of a tokenizer", 1, "coded/tokenizer_config.json: auto_map=.* is ever run"),
        ("own list without it", 1, f"--lowbit-tp-comm {_UNPARSED}"),
        ("own list without it, used", 1, "a RowParallelLinear runs before low bits are on"),
        ("own list without bits", 1, f"--lowbit-bits {_UNPARSED}"),
        ("own parser, typo", 2, "unrecognized arguments: --lowbit-tpcomm"),
        ("after --", 2, "unrecognized arguments: --lowbit-tp-comm"),
        ("twice", 2, "--lowbit-bits is given 2 times: give it once"),
        ("replace", 1, "--lowbit-tp-comm was given, but is missing from Megatron's arguments"),
        ("set wrong", 1, r"lowbit_bits: \[4, 6\] is a list: give a text"),
        ("swallow", 1, "megatron_script.py ended without loading a checkpoint: low bits were"),
        ("other loader", 1, "a RowParallelLinear runs before low bits are on: --lowbit-tp-comm"),
        ("other weights", 1, "a checkpoint with other weights was loaded after low bits were"),
        ("full disk", 1, "No space left on device: .*full.json"),
        ("full disk, sys.exit", 1, "No space left on device: .*full.json"),
        ("full disk, os._exit", 1, "No space left on device: .*full.json"),
        ("fork with it", 1, "fork.py ended without loading a checkpoint: low bits were never on"),
        ("no load", 1, "megatron_script.py ended without loading a checkpoint: low bits were"),
        ("exit without load", 1, "megatron_script.py ended without loading a checkpoint: low bits"),
        ("muted", 1, "no sync point that could use low bits.*already muted by Megatron"),
        ("typo", 1, "megatron_scrip.py: no such script"),
        ("module typo", 1, "-m megatron_lowbit.no.such: no such module"),
        ("no script", 1, "--lowbit-tp-comm .*: name a script, or -m and a module, before"),
        ("no checkout", 1, "MEGATRON_LM=.*nowhere is no Megatron-LM checkout"),
        ("no megatron.training", 1, "other.py ended without megatron.training's arguments"),
        ("without the flag", 1, "--lowbit-bits does nothing without --lowbit-tp-comm"),
        ("without --load", 1, "--lowbit-tp-comm needs --load"),
        ("no index", 1, "no calibration index at .*nowhere"),
        ("unknown argument", 2, "unrecognized arguments: --lowbit-tpcomm"),
        ("needs CUDA", 1, "--transformer-impl transformer_engine needs CUDA: leave it out"),
        ("half an environment", 1, "MASTER_ADDR=node1 without RANK, WORLD_SIZE, MASTER_PORT: st"),
        ("no sequence", 1, "--lowbit-all-gather means nothing without --sequence-parallel"),
    ],
)
def test_bad_input_is_one_line(ran, name, status, message):
    assert ran[name]["status"] == [status], ran[name]
    assert re.search(message, _line(ran[name])), ran[name]["err"]


def test_what_one_rank_meets_ends_all(ran):
    result = ran["rank 1 muted"]
    assert result["status"] == [1, 1, 1], result
    for rank in range(3):
        assert re.search("rank 0 has 4, rank 1 has 0 of the same layers", _line(result, rank))


def test_ctrl_c_ends_cleanly_and_keeps_the_statistics(ran):
    assert ran["interrupt"]["status"] == [130], ran["interrupt"]
    assert _line(ran["interrupt"]) == "interrupted"
    assert json.loads((ran["directory"] / "interrupted.json").read_text())["total"] == []


def test_a_full_disk_fails_the_run_of_several_ranks(ran):
    assert ran["full disk, 3 ranks"]["status"] == [1, 0, 0], ran["full disk, 3 ranks"]
    assert "No space left on device" in _line(ran["full disk, 3 ranks"])


def test_an_early_exit_of_the_script_keeps_the_statistics(ran):
    assert ran["early exit"]["status"] == [0], ran["early exit"]
    assert (ran["directory"] / "early.json").exists()


def test_the_scripts_own_failures_stay_its_own(ran):
    assert ran["raise"]["status"] == [1]
    assert "FileNotFoundError: what the script itself lacks" in ran["raise"]["err"][0]
    assert "Traceback" in ran["raise"]["err"][0]


def test_the_launcher_explains_itself():
    for words, status in ((["--help"], 0), ([], 2)):
        done = subprocess.run(
            [sys.executable, *LAUNCH, *words], env=_environment(), capture_output=True, text=True
        )
        assert done.returncode == status
        assert "python -m megatron_lowbit.launch SCRIPT ARGS... --lowbit-tp-comm" in done.stdout


@pytest.mark.skipif("MEGATRON_LM" not in os.environ, reason="MEGATRON_LM names no checkout")
@pytest.mark.skipif(not QUICKSTART.is_dir(), reason=f"no {QUICKSTART}: run examples/quickstart.sh")
def test_a_checkouts_own_script_gives_what_generate_py_gives():
    """On a real model, whose tokenizer knows all tokens: older releases cannot spell others."""
    for package in ("simpy", "six"):  # of Megatron's examples or training, in some releases
        pytest.importorskip(package)
    checkout = Path(os.environ["MEGATRON_LM"])
    (script,) = checkout.glob("examples/inference/*/gpt_static_inference.py")
    more = ["--num-tokens-to-generate", "10", "--prompts", "The capital of France is"]
    plain = torchrun(3, GENERATE, "--load", QUICKSTART, *FIXED, *more, env=_environment())
    assert plain.returncode == 0, plain.stderr[-4000:]
    if "use_legacy_static_engine" in script.read_text():
        more = ["--use-legacy-static-engine", *more]
    load = ["--load", QUICKSTART, "--use-checkpoint-args", "--micro-batch-size", "1", *THREE]
    done = torchrun(3, *LAUNCH, script, *load, *FIXED, *more, env=_environment(), timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("> low-bit communication: 60 sync points use") == 1
    (text,) = re.findall(r"The capital of France is \.\.\. (.*)", done.stdout)
    expected = plain.stdout.partition("The capital of France is[")[2].rstrip("]\n")
    assert text == expected.replace("\n", "\\n")
