"""The calibration loop: data-parallel ranks, interruption and NaN change nothing in the numbers."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_lowbit.calibration import calibration_loop
from megatron_lowbit.calibration.calibration_loop import Observations, calibrate
from megatron_lowbit.calibration.saved_state import Checkpointer, Progress
from megatron_lowbit.calibration.statistics import RunningStatistics
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.model.stages import WHOLE, Stages

SEQUENCES = torch.arange(7 * 4).view(7, 4)  # 7: not divisible by 2 or 3 ranks
POINTS, HIDDEN = 2, 5


def _partial(tokens: torch.Tensor, point: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(tokens[0]) * 10 + point)
    return torch.randn(len(tokens), HIDDEN, generator=generator)


def _calibrate(
    rank: int,
    directory: str,
    *,
    stop_after=None,
    resume=False,
    bad=None,
    identity=0,
    dp_group=None,
    tp_group=None,
    stages=WHOLE,
    at_once=1,
):
    """Calibrate a model whose partials are random but fixed; optionally dying at a sequence."""
    part = dist.get_rank(tp_group) if tp_group else 0
    layer = stages.number + 1
    observations = Observations([f"layer {layer} a", f"layer {layer} b"], HIDDEN)
    observers = [observations.observer(point) for point in range(POINTS)]

    def forward(several):
        for tokens in several:
            run(tokens)

    def run(tokens):
        if stop_after is not None and int(tokens[0]) >= 4 * stop_after:
            raise InterruptedError
        for point, observe in enumerate(observers):
            partial = _partial(tokens, point) + part
            is_last = stages.number == stages.count - 1
            if bad is not None and int(tokens[0]) == 4 * bad and part == 0 and is_last:
                partial[1, 2] = torch.nan
            observe(partial)

    statistics = RunningStatistics(POINTS, HIDDEN)
    groups = {"dp_group": dp_group, "tp_group": tp_group, "stages": stages}
    checkpointer = Checkpointer(Path(directory), {"run": identity}, **groups)
    progress = checkpointer.load(statistics) if resume else Progress()
    try:
        calibrate(
            SEQUENCES,
            forward,
            observations,
            statistics,
            checkpointer=checkpointer,
            progress=progress,
            device="cpu",
            at_once=at_once,
            **groups,
        )
    except InterruptedError:
        return None
    return statistics.result(), progress


def _stop_and_resume(rank: int, directory: str) -> dict:
    calibration_loop.SAVE_EVERY = 2
    stopped = _calibrate(rank, directory, stop_after=5)
    left = sorted(path.name for path in Path(directory).iterdir())
    try:
        _calibrate(rank, directory, resume=True, identity=1)
        other = ""
    except LowbitError as error:
        other = str(error)
    return {
        "stopped": stopped,
        "left": left,
        "resumed": _calibrate(rank, directory, resume=True),
        "other": other,
    }


def _share(rank: int, directory: str) -> dict:
    calibration_loop.SAVE_EVERY = 2
    return {
        "whole": _calibrate(rank, directory + "/a"),
        "nan": _calibrate(rank, directory + "/b", bad=3),
    }


def _two_by_two(rank: int, directory: str) -> dict:
    """2 tensor-parallel x 2 data-parallel ranks, with a NaN on one part only."""
    calibration_loop.SAVE_EVERY = 2
    mine = {}
    for name, members in (("tp", ([0, 1], [2, 3])), ("dp", ([0, 2], [1, 3]))):
        groups = [dist.new_group(ranks) for ranks in members]
        mine[f"{name}_group"] = next(
            g for g, ranks in zip(groups, members, strict=True) if rank in ranks
        )
    return {
        "nan": _calibrate(rank, directory, bad=3, **mine),
        "files": sorted(path.name for path in Path(directory).iterdir()),
    }


def _two_stages(rank: int, directory: str) -> dict:
    """2 pipeline stages, with a NaN on the last one only, and 2 sequences at once."""
    calibration_loop.SAVE_EVERY = 2
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    mine = {"dp_group": alone, "tp_group": alone, "stages": Stages(dist.group.WORLD), "at_once": 2}
    stopped = _calibrate(rank, directory, bad=3, stop_after=5, **mine)
    return {
        "stopped": stopped,
        "nan": _calibrate(rank, directory, bad=3, resume=True, **mine),
        "files": sorted(path.name for path in Path(directory).iterdir()),
    }


def _damaged(rank: int, directory: str) -> list[str]:
    """Messages of resuming from states in which something is not as it was."""
    calibration_loop.SAVE_EVERY = 2
    _calibrate(rank, directory, stop_after=5)
    state, saved = next(Path(directory).glob("state_*")), Path(directory) / "progress.json"
    whole, text = state.read_bytes(), saved.read_text()
    flipped = bytearray(whole)
    flipped[-100] ^= 4
    messages = []
    for data in (whole[:-9], bytes(flipped), whole.replace(b"F64", b"I64")):
        messages.append(_resume(rank, directory, state, data))
    state.write_bytes(whole)
    for old, new in (
        ('"done": 4', '"done": 5'),
        ('"done": 4', '"done": 4.0'),
        ('"done": 4', '"done": "4"'),
        ('"done": 4', '"done": true'),
        ('"skipped": []', '"skipped": ["sequence 1: x"]'),
        ('"skipped": []', '"skipped": 7'),
        (text, "[" * 100_000),
        (text, "[]"),
        (text, "{}"),
    ):
        messages.append(_resume(rank, directory, saved, text.replace(old, new).encode()))
    return messages


def _resume(rank: int, directory: str, path: Path, data: bytes) -> str:
    path.write_bytes(data)
    try:
        _calibrate(rank, directory, resume=True)
    except LowbitError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    return run_ranks(1, _share, directory, str(directory))[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_data_parallel_ranks_give_the_same_bits(alone, ranks, tmp_path):
    for result in run_ranks(ranks, _share, tmp_path, str(tmp_path)):
        assert torch.equal(result["whole"][0], alone["whole"][0])
        assert torch.equal(result["nan"][0], alone["nan"][0])
        assert result["nan"][1] == alone["nan"][1]


def test_nan_is_left_out_and_named(alone):
    result, progress = alone["nan"]
    assert result.isfinite().all()
    assert not torch.equal(result, alone["whole"][0])
    assert progress.skipped == ["sequence 3: not finite at layer 1 a"]
    assert progress.done == len(SEQUENCES)


def test_resumed_run_gives_the_same_bits(alone, tmp_path):
    result = run_ranks(1, _stop_and_resume, tmp_path / "ranks", str(tmp_path / "state"))[0]
    assert result["stopped"] is None
    assert result["left"] == ["progress.json", "state_4_part0.safetensors"]
    assert torch.equal(result["resumed"][0], alone["whole"][0])
    assert "run without --resume" in result["other"]


def test_tensor_and_data_parallel_ranks_together(alone, tmp_path):
    results = run_ranks(4, _two_by_two, tmp_path / "ranks", str(tmp_path / "state"))
    for rank, result in enumerate(results):
        statistics, progress = result["nan"]
        assert progress == alone["nan"][1]
        if rank % 2 == 0:  # the first part has the partials of the run alone
            assert torch.equal(statistics, alone["nan"][0])
        else:
            assert (statistics[:, :3] > alone["nan"][0][:, :3]).all()
    parts = [f"state_7_part{part}.safetensors" for part in (0, 1)]
    assert results[0]["files"] == ["progress.json", *parts]


def test_pipeline_stages_leave_out_the_same_sequences_and_resume_their_own_state(alone, tmp_path):
    results = run_ranks(2, _two_stages, tmp_path / "ranks", str(tmp_path / "state"))
    for result in results:
        statistics, progress = result["nan"]
        assert result["stopped"] is None
        assert progress.skipped == ["sequence 3: not finite at layer 2 a"]
        assert torch.equal(statistics, alone["nan"][0])
    parts = [f"state_7_part{part}.safetensors" for part in (0, 1)]
    assert results[0]["files"] == ["progress.json", *parts]


def test_a_damaged_state_is_named(tmp_path):
    messages = run_ranks(1, _damaged, tmp_path / "ranks", str(tmp_path / "state"))[0]
    for message in messages:
        assert "cannot resume from" in message
        assert "run without --resume" in message and "\n" not in message
