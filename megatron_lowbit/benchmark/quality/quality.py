"""The quality that the project set itself, measured step by step: `bench-quality`.

Each step is a run of calibrate or evaluate in simulated tensor parallelism, with its JSON beside
the others in the output directory; a step whose JSON is there is not run again.
Then the targets are read off: `targets` says what was asked and what came out.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_lowbit import cli
from megatron_lowbit.benchmark.quality.texts import write_texts
from megatron_lowbit.codecs.experiments.candidates import CANDIDATES
from megatron_lowbit.codecs.peers.systems import PEERS
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.output import read_summary
from megatron_lowbit.files import import_path, in_checkout, write_atomic
from megatron_lowbit.json_files import read_json, shown

BUDGET = "4.2"
KINDS = ("prose", "code", "dialogue")
PAPER, OURS, OURS_TWO_SHOT = "static-hybrid", "recipe", "recipe@two-shot"
_OWN = (
    *("bf16", "int4", "int4-random", PAPER, "static-hybrid@two-shot", "scaled-hybrid"),
    *("rotated-hybrid", "rotated-hybrid-3", "shaped-hybrid", "shaped-hybrid-3"),
    *("shaped-hybrid@two-shot", "shaped-hybrid-4+6"),
    *(OURS, OURS_TWO_SHOT, "recipe-3.2", "recipe-2.7"),
)
_SHORT = ("bf16", PAPER, "rotated-hybrid", "shaped-hybrid", OURS, OURS_TWO_SHOT, "recipe-3.2")
_TASKS = (PAPER, "shaped-hybrid", OURS, OURS_TWO_SHOT)


# Each peer one-shot and, where that is how it sends, two-shot.
_PEERS = (
    *PEERS,
    *(f"{name}@two-shot" for name, peer in PEERS.items() if peer.collective == "two-shot"),
)
# Our recipes at the bits of the peers that take more than 4.2.
_AT_THEIR_BITS = tuple(
    f"recipe-{bits}{way}" for bits in ("4.5", "5", "8") for way in ("", "@two-shot")
)


@dataclass(frozen=True)
class Step:
    """One run of evaluate, in simulated tensor parallelism, with the name of its JSON file.

    Attributes:
        texts: Kinds of held-out text.
        skipped: Sync points of its calibration index's recipe that send nothing.
        budget: Bits a value of that recipe.
    """

    name: str
    ranks: int
    codecs: tuple[str, ...]
    texts: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    skipped: int = 0
    budget: str = BUDGET


def steps(tokens: int, limit: int) -> list[Step]:
    """What is measured: `tokens` of each text, `limit` items of each task."""
    length = ("--tokens", str(tokens))
    tried = ("rotated-hybrid", "shaped-hybrid", *CANDIDATES)
    return [
        Step("tp3", 3, _OWN, KINDS, length),
        Step("tp3-peers", 3, (*_PEERS, *_AT_THEIR_BITS), KINDS, length),
        Step("tp8", 8, _SHORT, KINDS, length),
        Step("tp3-candidates", 3, tried, ("prose",), length),
        Step("tp3-tasks", 3, _TASKS, (), ("--tasks", "all", "--limit", str(limit))),
    ]


def run(
    checkpoint: Path, directory: Path, plan: list[Step], settings: dict[str, int]
) -> dict[str, dict]:
    """Run the steps whose results are not in `directory` yet; step -> its results.

    `settings` is what `plan` was made with, so that results of others are not taken.

    Raises:
        LowbitError: A step failed; what is finished stays, and the next call goes on.
    """
    prose = in_checkout("examples/data/persuasion.txt")
    directory.mkdir(parents=True, exist_ok=True)
    _check_settings(directory, {"load": str(checkpoint), **settings})
    texts = write_texts(directory / "texts")
    files = {
        "prose": prose,
        "code": texts["code_held_out"],
        "dialogue": texts["dialogue_held_out"],
    }
    results = {}
    for step in plan:
        output = directory / f"{step.name}.json"
        if not output.exists():
            index = _calibrated(checkpoint, directory, step)
            codecs = ("--codecs", ",".join(step.codecs), "--resume")
            data = ("--data", *(str(files[kind]) for kind in step.texts)) if step.texts else ()
            where = ("--index", str(index), "--simulate-tp", str(step.ranks))
            cli.say(f"-- {step.name}")
            _tool(
                "evaluate",
                ("--load", str(checkpoint), *where, *codecs, *data, *step.arguments),
                output,
            )
        results[step.name] = read_summary(output)
    return results


def _check_settings(directory: Path, settings: dict) -> None:
    """Raise if what is in `directory` was measured with other settings; note them if it is new."""
    path = directory / "settings.json"
    if not path.exists():
        write_atomic(path, json.dumps(settings).encode())
    elif (found := read_json(path)) != settings:
        raise LowbitError(f"{directory} has results of {shown(found)}: name another directory")


def _calibrated(checkpoint: Path, directory: Path, step: Step) -> Path:
    """The calibration index of a step, with a recipe."""
    index = directory / f"index-tp{step.ranks}{f'-skip{step.skipped}' * bool(step.skipped)}"
    if not index.exists():
        cli.say(f"-- {index.name}")
        data = ("--data", str(in_checkout("examples/data/emma.txt")), "--seq-length", "128")
        where = ("--load", str(checkpoint), "--simulate-tp", str(step.ranks))
        recipe = ("--budget", step.budget, *(("--skip", str(step.skipped)) if step.skipped else ()))
        _tool("calibrate", (*where, *recipe, *data, "--resume"), index)
    return index


def _tool(name: str, arguments: tuple[str, ...], output: Path) -> None:
    command = [sys.executable, "-m", "megatron_lowbit", name, *arguments, "--output", str(output)]
    env = os.environ | {"PYTHONPATH": import_path()}
    done = subprocess.run(command, stdout=subprocess.DEVNULL, env=env, check=False)
    if done.returncode:
        raise LowbitError(f"{name} failed: what is finished stays in {output.parent}")
