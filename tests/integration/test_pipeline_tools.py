"""The tools with pipeline stages, and with experts on data-parallel ranks: the same results.

One checkpoint of 4 layers; tensor parallel 2 alone, and 2 stages of it. Another one with experts.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from forks import forked
from on_ranks import directory_of_all
from releases import ROOT
from test_tools import CALIBRATE, EVALUATE, TEXT

from megatron_lowbit.calibration.index_files import read_index
from megatron_lowbit.integration.loops import calibrate_command
from megatron_lowbit.integration.runtime import session
from megatron_lowbit.integration.sums.chain_check import _moves_between

RANDOM = Path(__file__).with_name("random_checkpoint.py")
EXPERTS = (
    "--num-layers 4 --hidden-size 48 --num-attention-heads 4 --ffn-hidden-size 64 --swiglu --bf16 "
    "--seq-length 64 --max-position-embeddings 128 --position-embedding-type rope "
    "--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights "
    "--vocab-size 1000 --init-method-std 0.3 --num-experts 4 --moe-router-topk 2 "
    "--moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 32 "
    "--moe-token-dispatcher-type alltoall "
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model"
)
CONVERT = ROOT / "tools" / "convert_hf.py"
STAGES = ["--pipeline-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def deep(once) -> Path:
    """A checkpoint of 4 layers; its last stage has a copy of the first one's embeddings."""
    pytest.importorskip("transformers")
    return once("deep", _convert)


def _convert(directory: Path) -> Path:
    from tiny_models import save_llama

    shape = {"num_hidden_layers": 4, "num_key_value_heads": 6}
    save_llama(directory / "hf", tie_word_embeddings=True, **shape)
    command = [CONVERT, "--model", directory / "hf", "--save", directory / "ckpt"]
    forked(None, *command, "--tensor-model-parallel-size", "2")
    return directory / "ckpt"


def _calibration(deep: Path, output: Path, *more: str) -> list[str]:
    """Arguments of a small one."""
    small = ["--sequences", "5", "--seq-length", "16"]
    return ["--load", str(deep), "--data", str(TEXT), "--output", str(output), *small, *more]


def run_calibration(ranks: int, deep: Path, output: Path, *more: str, status: int = 0):
    return forked(ranks, CALIBRATE, *_calibration(deep, output, *more), status=status)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def index(deep, tmp_path_factory) -> Path:
    """A calibration index with a recipe that was made without a pipeline."""
    output = tmp_path_factory.mktemp("index") / "lowbit"
    run_calibration(2, deep, output, "--budget", "4")
    return output


def test_an_index_and_a_plan_over_stages_have_the_same_bytes(deep, index, tmp_path):
    run_calibration(4, deep, tmp_path / "lowbit", *STAGES, "--budget", "4")
    found = files_of(tmp_path / "lowbit")
    assert len(found) == 5
    assert found == files_of(index)
    assert [path.name for path in tmp_path.iterdir()] == ["lowbit"]


@pytest.mark.parametrize(
    ("one", "split"),
    [
        (
            ["--tensor-model-parallel-size", "1"],
            [*STAGES, "--decoder-first-pipeline-num-layers", "1"],
        ),
        (["--simulate-tp", "3", "--budget", "4"], ["--pipeline-model-parallel-size", "4"]),
    ],
    ids=["stages of different sizes and data-parallel ranks", "simulated ranks over four stages"],
)
def test_four_ranks_give_the_same_bytes_as_one(deep, tmp_path, one, split):
    run_calibration(1, deep, tmp_path / "one", *one)
    run_calibration(4, deep, tmp_path / "four", *one, *split)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "four")


def test_a_stream_that_changes_between_stages_is_seen():
    """By digests of what each stage's layers were given and left; none where it has no numbers."""
    assert not _moves_between([("a", "b")])
    assert not _moves_between([("a", "b"), ("b", "c"), ("c", "d")])
    assert _moves_between([("a", "b"), ("b", "c"), ("x", "d")])
    assert not _moves_between([("a", ""), ("x", "c")])


def _cut(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, of whose stages one has the last layer: its MLP does not differentiate."""
    for layer in model.modules():
        if getattr(layer, "layer_number", 0) == 4 and hasattr(layer, "mlp"):
            layer.mlp.linear_fc1.forward = torch.no_grad()(layer.mlp.linear_fc1.forward)
    return model


@pytest.mark.on_ranks(4)
def test_without_gradients_a_plan_takes_the_end_of_a_stage_for_the_end_of_a_chain(
    deep, monkeypatch, capsys
):
    """The layer that does not differentiate is on the last stage: the first one must not wait."""
    load = session.load_whole_model
    monkeypatch.setattr(session, "load_whole_model", lambda args: _cut(load(args)))
    found = []
    for name, stages in (("whole", []), ("split", STAGES)):
        output = directory_of_all("plans") / name
        some = ["--budget", "4", "--sequences", "1", *stages]
        calibrate_command.main(_calibration(deep, output, *some))
        if os.environ["RANK"] == "0":
            reason = "no gradient goes through layer 4 mlp.linear_fc2"
            assert f"planning without gradients ({reason})" in capsys.readouterr().out
        found.append(read_index(output).layers)
    whole, split = found
    for layer in (3, 4):  # no chain ends before them
        for name, record in whole[layer].items():
            for key, value in vars(record).items():
                assert torch.equal(value, getattr(split[layer][name], key)), (layer, name, key)
    end = split[2]["mlp.linear_fc2"]
    assert torch.equal(end.divergence_carried, end.divergence)
    assert not torch.equal(whole[2]["mlp.linear_fc2"].divergence_carried, end.divergence_carried)
    assert torch.equal(whole[2]["mlp.linear_fc2"].missed, end.missed)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--num-virtual-stages-per-pipeline-rank", "2"], "with virtual stages is not supported"),
        (["--bf16", "--fp32-residual-connection"], "--fp32-residual-connection is not supported"),
        (["--pipeline-model-parallel-layout", "Etttt|L"], "pipeline stage 1 of 2 has no layer"),
    ],
)
def test_what_a_pipeline_cannot_do_is_one_line_on_every_rank(deep, arguments, text, tmp_path):
    one = ["--tensor-model-parallel-size", "1"]
    done = run_calibration(2, deep, tmp_path / "lowbit", *one, *STAGES, *arguments, status=1)
    lines = done.stderr.splitlines()
    assert len([line for line in lines if "error: " in line and text in line]) == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


CODECS = "bf16,int4-random,rotated-hybrid-3@two-shot,recipe,recipe-3.5,recipe-3.5@feedback"


def evaluation(ranks: int, deep: Path, index: Path, output: Path, *more: str) -> dict:
    small = ["--tokens", "64", "--seq-length", "32", "--generate", "1", "--codecs", CODECS]
    command = [EVALUATE, "--load", deep, "--index", index, "--data", TEXT, *small]
    forked(ranks, *command, "--output", output, *more)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return json.loads(output.read_text())


def test_an_evaluation_over_stages_has_the_same_results(deep, index, tmp_path):
    """All but those of errors that are carried: a chain ends where its stage does."""
    whole = evaluation(2, deep, index, tmp_path / "whole" / "summary.json")
    split = evaluation(4, deep, index, tmp_path / "split" / "summary.json", *STAGES)
    assert len(split["sync_points"]["points"]) == 8
    carried = [results_of(summary, "recipe-3.5@feedback") for summary in (whole, split)]
    assert 0 < carried[0][0]["kl"] != carried[1][0]["kl"] > 0
    kl = {row["variant"]: row["kl"] for row in split["texts"][0]["results"]}
    assert carried[1][0]["kl"] < kl["recipe-3.5"], "within a stage errors are carried"
    assert whole == split


def results_of(summary: dict, variant: str) -> list[dict]:
    """The results of one variant on the text and its prompts, and its errors: taken out."""
    taken = []
    for measured in (summary["texts"][0], summary["generation"][0]):
        found = [row for row in measured["results"] if row["variant"] == variant]
        measured["results"] = [row for row in measured["results"] if row not in found]
        taken += found
    for point in summary["sync_points"]["points"]:
        taken += [point[key].pop(variant) for key in ("sqnr", "worst_token_sqnr", "stream_sqnr")]
    return taken


@pytest.fixture(scope="module")
def mixture(deep, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint with experts, and its index and recipe, for 2 simulated ranks."""
    directory = tmp_path_factory.mktemp("mixture")
    forked(None, RANDOM, directory / "ckpt", *EXPERTS.split(), deep / "tokenizer")
    run_calibration(1, directory / "ckpt", directory / "lowbit", *SIMULATED, "--budget", "4")
    return directory / "ckpt", directory / "lowbit"


SIMULATED = ["--simulate-tp", "2"]
SPREAD = [*SIMULATED, "--expert-model-parallel-size", "2"]


def test_experts_on_other_ranks_and_stages_give_the_same_bytes(mixture, tmp_path):
    checkpoint, index = mixture
    run_calibration(4, checkpoint, tmp_path / "lowbit", *SPREAD, *STAGES, "--budget", "4")
    assert files_of(tmp_path / "lowbit") == files_of(index)


def test_an_evaluation_with_experts_on_other_ranks_has_the_same_results(mixture, tmp_path):
    """3 sequences for 2 pairs of ranks: the pair without a third must not be waited for."""
    more = ["--tokens", "96", "--codecs", "bf16,recipe@feedback"]
    whole = evaluation(1, *mixture, tmp_path / "whole" / "summary.json", *SIMULATED, *more)
    split = evaluation(4, *mixture, tmp_path / "split" / "summary.json", *SPREAD, *more)
    assert whole == split
