"""The measurement of robustness, all of it, on a tiny random model."""

import argparse
import contextlib
import io
import json
from pathlib import Path

import pytest
from on_ranks import directory_of_all
from releases import ROOT

pytest.importorskip("transformers")
from tiny_llama import tokenizer  # noqa: E402

from megatron_lowbit.benchmark.quality import robustness  # noqa: E402
from megatron_lowbit.benchmark.quality.robustness_plan import Calibration  # noqa: E402
from megatron_lowbit.errors import LowbitError  # noqa: E402
from megatron_lowbit.integration.runtime import session  # noqa: E402

pytestmark = pytest.mark.on_ranks(1)
CODECS = ["static-hybrid", "rotated-hybrid", "shaped-hybrid", "recipe"]
CALIBRATIONS = [Calibration("prose", 4, 1), Calibration("code", 2, 1)]
# 256 features: two of each sync point are rotated-hybrid's BF16 features.
MODEL = (
    "--num-layers 2 --hidden-size 256 --ffn-hidden-size 96 --num-attention-heads 4 --seq-length 256"
    " --max-position-embeddings 256 --normalization RMSNorm --disable-bias-linear --bf16"
    " --position-embedding-type rope --transformer-impl local"
)


@pytest.fixture(scope="module")
def inputs() -> Path:
    """A tokenizer, and the first 30 kB of each text: to tokenize all would take the longest."""
    directory = directory_of_all("inputs")
    tokenizer().save_pretrained(directory / "tokenizer")
    for path in (ROOT / "examples" / "data").glob("*.txt"):
        (directory / path.name).write_bytes(path.read_bytes()[:30_000])
    return directory


def measure(inputs: Path, output: Path, *, resume: bool = False, simulate_tp: int = 2) -> None:
    options = argparse.Namespace(
        output=output, tokens=256, name="tiny", resume=resume, simulate_tp=simulate_tp
    )
    argv = [*MODEL.split(), "--tokenizer-type", "HuggingFaceTokenizer"]
    argv += ["--tokenizer-model", str(inputs / "tokenizer")]
    try:
        robustness.run(options, argv, examples=inputs, calibrations=CALIBRATIONS)
    except LowbitError:
        session.shutdown()
        raise


@pytest.fixture(scope="module")
def whole(inputs) -> tuple[str, bytes]:
    """What a run that nothing stops prints and writes."""
    output = directory_of_all("whole") / "whole.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        measure(inputs, output)
    return printed.getvalue(), output.read_bytes()


def test_every_calibration_is_measured_on_every_text_with_every_codec(whole):
    printed, content = whole[0], json.loads(whole[1])
    assert (content["model"], content["tp_size"], content["budget"]) == ("tiny", 2, 4.2)
    texts = [(text["name"], text["tokens"]) for text in content["texts"]]
    assert texts == [("prose", 256), ("code", 256), ("dialogue", 256)]
    rows = content["calibrations"]
    assert [(row["kind"], row["sequences"]) for row in rows] == [("prose", 4), ("code", 2)]
    assert rows[0]["same_features"] == 1
    for row in rows:
        assert list(row["results"]) == ["prose", "code", "dialogue"]
        for results in row["results"].values():
            kl = {codec: result["kl"] for codec, result in results.items()}
            assert list(kl) == CODECS
            assert min(kl.values()) > 0, kl
            assert kl["static-hybrid"] > 2 * kl["shaped-hybrid"], kl
    assert rows[0]["results"] != rows[1]["results"]
    assert "calibration prose-4-1\ncalibration code-2-1\ntiny, TP 2, simulated, 256" in printed
    assert "| prose, 4 sequences, seed 1 |         100 % |" in printed


def test_a_stopped_run_goes_on_from_its_calibrations_to_the_same_bytes(
    inputs, whole, tmp_path, monkeypatch
):
    def stop(*args, **kwargs) -> None:
        raise LowbitError("stopped")

    output = tmp_path / "again.json"
    with monkeypatch.context() as patch:
        patch.setattr(robustness, "evaluate", stop)
        with pytest.raises(LowbitError, match="^stopped$"):
            measure(inputs, output)
    kept = {path.name for path in (tmp_path / ".again.json.partial").iterdir()}
    assert {"prose-4-1", "code-2-1"} <= kept
    monkeypatch.setattr(robustness, "calibrate_model", stop)  # no calibration is missing
    with pytest.raises(LowbitError, match="calibrated at tensor parallel size 2, this run has 4"):
        measure(inputs, output, resume=True, simulate_tp=4)
    measure(inputs, output, resume=True)
    assert output.read_bytes() == whole[1]
    for file in (output, directory_of_all("whole") / "whole.json"):
        assert list(file.parent.iterdir()) == [file], "what was kept has served"
