"""Each capability on each supported release of megatron-core: the rows of the support matrix.

`matrix_worker.py` runs them, in one group of processes for each release; what is asserted here of a
row is what its cell in the table of integration/README.md means by "yes".
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matrix_worker import CODECS, RANKS
from releases import MAIN, RELEASES, describe_main, environment, is_release

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.calibration.saved_state import Progress

WORKER = Path(__file__).with_name("matrix_worker.py")
DENSE = ["self_attention.linear_proj", "mlp.linear_fc2"]
SHARED = ["self_attention.linear_proj", "mlp.shared_experts.linear_fc2"]


@pytest.fixture(scope="module", params=RELEASES)
def release(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def ranks(release, tmp_path_factory):
    """What each of 4 ranks saw, or the error that ended a row."""
    out = tmp_path_factory.mktemp("matrix")
    env = {**environment(release), "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", WORKER, out],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]
    assert is_release(results[0]["version"], release)
    return results


@pytest.fixture(autouse=True)
def name_main(release, record_property):
    """What "main" was, for JUnit's report: by test, since a worker of xdist has no testsuite."""
    if release == MAIN:
        record_property(MAIN, describe_main())


def row(ranks: list[dict], name: str) -> list[dict]:
    """What each rank saw in a row of the worker."""
    for rank in ranks:
        assert "error" not in rank[name], rank[name]["error"]
    return [rank[name] for rank in ranks]


def check_codecs(results: list[dict], names: list[str], *, layers: int = 2) -> None:
    """The sums of every rank: equal, as exact as they should be, and gone after `remove`."""
    first = results[0]
    for result in results:
        assert sorted(result["points"]) == sorted(
            (layer, name) for layer in range(1, layers + 1) for name in names
        )
        assert result["restored"]
        for codec in CODECS:
            assert torch.equal(result[codec], first[codec]), codec
    # Only the order of an fp32 sum of two could differ, which has none; 30 dB: see test_core.py.
    assert sqnr(first["exact"], first["bf16"]) > 60
    assert 8 < sqnr(first["native"], first["rotated-hybrid"]) < 40


@pytest.mark.support("local spec, TP 2")
def test_local_spec(ranks):
    """A dense model, all-reduces; of Megatron's own all-reduces the embedding's is left."""
    results = row(ranks, "local spec")
    check_codecs(results, DENSE)
    for result in results:
        assert result["native_calls"] == 5
        assert result["calls"] == 1
        assert result["collectives"] == {"one-shot"}


@pytest.mark.support("calibration")
def test_calibration(ranks):
    """The index of all rows is made on the release itself."""
    for result in row(ranks, "local spec"):
        assert result["progress"] == Progress(done=5)


@pytest.mark.support("sequence parallel")
def test_sequence_parallel(ranks):
    results = row(ranks, "sequence parallel")
    check_codecs(results, DENSE)
    assert all(result["collectives"] == {"reduce-scatter"} for result in results)


@pytest.mark.support("sequence parallel with all-gathers in low bits")
def test_all_gathers(ranks):
    """They cost a little quality, in `rotated-hybrid` and beside BF16 sums alike."""
    results = row(ranks, "all-gather in low bits")
    for result in results:
        assert result["restored"]
        assert result["collectives"] == {"reduce-scatter", "all-gather"}
        for codec in CODECS:
            assert torch.equal(result[codec], results[0][codec]), codec
            assert 8 < sqnr(result["native"], result[codec]) < 40


@pytest.mark.support("MoE with a shared expert")
def test_experts(ranks):
    """A shared expert is a sync point; routed experts stay native and are listed."""
    results = row(ranks, "MoE")
    check_codecs(results, SHARED)
    for result in results:
        assert "2 stay native (2: routed experts, summed by the token dispatcher" in result["text"]


@pytest.mark.support("pipeline parallel 2 x TP 2")
def test_pipeline(ranks):
    check_stages(row(ranks, "pipeline"), {0: (1, 2), 1: (3, 4)})


@pytest.mark.support("interleaved pipeline 2 x TP 2")
def test_interleaved_pipeline(ranks):
    check_stages(row(ranks, "interleaved pipeline"), {0: (1, 3), 1: (2, 4)})


def check_stages(results: list[dict], layers: dict[int, tuple[int, int]]) -> None:
    """Two stages give the bits of one, by one index of global layer numbers.

    Args:
        results: Of ranks 0 and 1, which are the first stage, and 2 and 3, which are the last.
        layers: Numbers by stage.
    """
    check_codecs([result["whole"] for result in results], DENSE, layers=4)
    for rank, result in enumerate(results):
        here = layers[rank // 2]
        assert sorted(result["points"]) == sorted((n, name) for n in here for name in DENSE)
        text = f"4 sync points of layers {here[0]}, {here[1]} use rotated-hybrid"
        assert text in result["text"]
        for case in ("native", "after", "folded", "carried", *CODECS):
            assert len(result[case]) == (2 if rank // 2 else 0), "two micro-batches, last stage"
        if rank // 2:
            for case in ("native", "folded", "carried", *CODECS):
                assert torch.equal(result[case][0], result["whole"][case]), case
                assert torch.equal(result[case][1], results[2][case][1]), case
            assert torch.equal(result["after"][0], result["native"][0])
            assert not torch.equal(result["native"][0], result["native"][1])
        check_carried(result, is_interleaved=here[1] > here[0] + 1)
        check_half_native(result, here, is_last=rank > 1)


def check_carried(result: dict, *, is_interleaved: bool) -> None:
    """A chunk is a chain of its own, and its last sync point gives to nobody: it has more bits."""
    assert result["bits"] == ([4, 6, 4, 6] if is_interleaved else [4, 4, 4, 6])
    assert result["feedback"]["sync_points"] == 4
    assert result["feedback"]["dropped"] == 0
    assert "errors carried between 4 sync points" in result["carrying text"]


def check_half_native(result: dict, here: tuple[int, int], *, is_last: bool) -> None:
    """Low bits on the first stage only, and what goes wrong on one stage is said on both."""
    half, where = result["half"], f"of layers {here[0]}, {here[1]} use"
    assert half["removed"] == "low-bit communication: removed"
    if is_last:
        assert f"no sync point {where}s it; 4 stay native (4: left native by rules" in half["text"]
        assert half["stats"] == 0
        assert 8 < sqnr(result["native"][0], half["logits"][0]) < 40
        assert not torch.equal(half["logits"][0], result["rotated-hybrid"][0])
    else:
        assert f"4 sync points {where} rotated-hybrid" in half["text"]
        assert half["stats"] == 4
    refused = result["refused"]
    assert re.search(r"ranks differ in their codec.*\(4 bits\).*\(3 bits\)", refused["bits"])
    assert "(found by rank 2)" in refused["bits"]
    assert "Identity has no Megatron-core transformer layer" in refused["none"]
    assert refused["empty stage"] == "no error"


def test_doctored_release(ranks):
    """Before anything is changed, with the symbol and what it is needed for."""
    for result in row(ranks, "doctored"):
        message = result["apply", "forward"]
        assert message.startswith("this megatron-core ")
        assert (
            "megatron.core.tensor_parallel.layers.RowParallelLinear.forward does not use the "
            "attribute explicit_expert_comm, sequence_parallel, skip_bias_add (needed to have its "
            "partial instead of its sum)" in message
        )
        missing = "megatron.core.transformer.transformer_layer.BaseTransformerLayer is missing"
        for step in ("apply", "calibrate"):
            assert missing in result[step, "class"]
        assert result["apply", "function"] == "no error", "only calibration needs it"
        assert "takes no parameter group (needed to sum natively" in result["calibrate", "function"]
        assert result["untouched"]
