"""The calibration loop: data-parallel ranks, interruption and NaN change nothing in the numbers."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_each_rank, run_ranks

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
    directory: Path,
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
    calibration_loop.SAVE_EVERY = 2
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
    checkpointer = Checkpointer(directory, {"run": identity}, **groups)
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


def _files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _share(rank: int, directory: Path) -> dict:
    return {
        "whole": _calibrate(rank, directory / "a"),
        "nan": _calibrate(rank, directory / "b", bad=3),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    return run_ranks(1, _share, directory, directory)[0]


@on_each_rank(2, 3)
def test_data_parallel_ranks_give_the_same_bits(rank, alone, tmp_path):
    result = _share(rank, tmp_path)
    assert torch.equal(result["whole"][0], alone["whole"][0])
    assert torch.equal(result["nan"][0], alone["nan"][0])
    assert result["nan"][1] == alone["nan"][1]


def test_nan_is_left_out_and_named(alone):
    result, progress = alone["nan"]
    assert result.isfinite().all()
    assert not torch.equal(result, alone["whole"][0])
    assert progress.skipped == ["sequence 3: not finite at layer 1 a"]
    assert progress.done == len(SEQUENCES)


@on_each_rank(1)
def test_resumed_run_gives_the_same_bits(rank, alone, tmp_path):
    state = tmp_path / "state"
    assert _calibrate(rank, state, stop_after=5) is None
    assert _files(state) == ["progress.json", "state_4_part0.safetensors"]
    with pytest.raises(LowbitError, match="run without --resume"):
        _calibrate(rank, state, resume=True, identity=1)
    resumed, _ = _calibrate(rank, state, resume=True)
    assert torch.equal(resumed, alone["whole"][0])


@on_each_rank(4)
def test_tensor_and_data_parallel_ranks_together(rank, alone, tmp_path):
    """2 tensor-parallel x 2 data-parallel ranks, with a NaN on one part only."""
    mine = {}
    for name, members in (("tp", ([0, 1], [2, 3])), ("dp", ([0, 2], [1, 3]))):
        groups = [dist.new_group(ranks) for ranks in members]
        mine[f"{name}_group"] = next(
            g for g, ranks in zip(groups, members, strict=True) if rank in ranks
        )
    statistics, progress = _calibrate(rank, tmp_path / "state", bad=3, **mine)
    assert progress == alone["nan"][1]
    if rank % 2 == 0:  # the first part has the partials of the run alone
        assert torch.equal(statistics, alone["nan"][0])
    else:
        assert (statistics[:, :3] > alone["nan"][0][:, :3]).all()
    if rank == 0:
        parts = [f"state_7_part{part}.safetensors" for part in (0, 1)]
        assert _files(tmp_path / "state") == ["progress.json", *parts]


@on_each_rank(2)
def test_pipeline_stages_leave_out_the_same_sequences_and_resume_their_own_state(
    rank, alone, tmp_path
):
    """2 pipeline stages, with a NaN on the last one only, and 2 sequences at once."""
    own = [dist.new_group([0]), dist.new_group([1])][rank]
    mine = {"dp_group": own, "tp_group": own, "stages": Stages(dist.group.WORLD), "at_once": 2}
    assert _calibrate(rank, tmp_path / "state", bad=3, stop_after=5, **mine) is None
    statistics, progress = _calibrate(rank, tmp_path / "state", bad=3, resume=True, **mine)
    assert progress.skipped == ["sequence 3: not finite at layer 2 a"]
    assert torch.equal(statistics, alone["nan"][0])
    if rank == 0:
        parts = [f"state_7_part{part}.safetensors" for part in (0, 1)]
        assert _files(tmp_path / "state") == ["progress.json", *parts]


@on_each_rank(1)
def test_a_damaged_state_is_named(rank, tmp_path):
    directory = tmp_path / "state"
    _calibrate(rank, directory, stop_after=5)
    state, saved = next(directory.glob("state_*")), directory / "progress.json"
    whole, text = state.read_bytes(), saved.read_text()
    flipped = bytearray(whole)
    flipped[-100] ^= 4
    for data in (whole[:-9], bytes(flipped), whole.replace(b"F64", b"I64")):
        _refused(rank, state, data)
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
        _refused(rank, saved, text.replace(old, new).encode())


def _refused(rank: int, path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(LowbitError, match="cannot resume from .*run without --resume") as error:
        _calibrate(rank, path.parent, resume=True)
    assert "\n" not in str(error.value)
