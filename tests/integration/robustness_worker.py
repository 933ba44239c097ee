"""The measurement of robustness on a tiny random model; run by test_robustness.py.

One process does everything: importing megatron.core takes 7-9 s. It is run through, stopped in the
middle of the evaluation, and resumed; OUT/seen.json says what happened.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tiny_llama import tokenizer

from megatron_lowbit.benchmark.quality import robustness
from megatron_lowbit.benchmark.quality.robustness_plan import Calibration
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.runtime import session

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "data"
CALIBRATIONS = [Calibration("prose", 4, 1), Calibration("code", 2, 1)]
# 256 features: two of each sync point are rotated-hybrid's BF16 features.
MODEL = (
    "--num-layers 2 --hidden-size 256 --ffn-hidden-size 96 --num-attention-heads 4 --seq-length 256"
    " --max-position-embeddings 256 --normalization RMSNorm --disable-bias-linear --bf16"
    " --position-embedding-type rope --transformer-impl local"
)


def short_examples(directory: Path) -> Path:
    """The first 30 kB of each text: tokenizing all of them would take longer than all else."""
    directory.mkdir()
    for path in EXAMPLES.glob("*.txt"):
        (directory / path.name).write_bytes(path.read_bytes()[:30_000])
    return directory


def main(out: Path) -> None:
    tokenizer().save_pretrained(out / "tokenizer")
    named = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", out / "tokenizer"]
    argv = [*MODEL.split(), *map(str, named)]
    examples = short_examples(out / "examples")

    def measure(output: str, *, resume: bool, simulate_tp: int = 2) -> str | None:
        """Its error."""
        options = argparse.Namespace(
            output=out / output, tokens=256, name="tiny", resume=resume, simulate_tp=simulate_tp
        )
        try:
            robustness.run(options, argv, examples=examples, calibrations=CALIBRATIONS)
        except LowbitError as error:
            session.shutdown()
            return str(error)

    seen = {"whole": measure("whole.json", resume=False)}
    evaluate = robustness.evaluate
    robustness.evaluate = stop
    seen["stopped"] = measure("again.json", resume=False)
    seen["kept"] = sorted(path.name for path in (out / ".again.json.partial").iterdir())
    robustness.evaluate, robustness.calibrate_model = evaluate, stop  # no calibration is missing
    seen["other"] = measure("again.json", resume=True, simulate_tp=4)
    seen["resumed"] = measure("again.json", resume=True)
    seen["left"] = sorted(path.name for path in out.iterdir())
    (out / "seen.json").write_text(json.dumps(seen))


def stop(*args, **kwargs) -> None:
    """In the place of a step."""
    raise LowbitError("stopped")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
