"""tools/gpu_check.sh --save-partials: of a checkpoint, all ranks' partials and what they become."""

import sys

import pytest
import torch
from releases import run

pytest.importorskip("transformers")
from megatron_lowbit.benchmark.gpu_check import saved_partials  # noqa: E402

CODE = """
import sys
from pathlib import Path
from megatron_lowbit import cli
from megatron_lowbit.benchmark.gpu_check import gpu_check_command, record_partials
record_partials.PARTIALS = Path(sys.argv[2])
cli.run(lambda: gpu_check_command.main(["--save-partials", sys.argv[1]]))
"""


def test_of_a_checkpoint(checkpoint, tmp_path):
    path = tmp_path / "partials.safetensors"
    done = run(sys.executable, "-c", CODE, checkpoint, path)
    assert "4 sync points, 3 ranks, 512 x 48" in done.stdout
    saved = saved_partials.load(path)
    assert [name.rpartition(" ")[2] for name in saved.names] == [
        *("self_attention.linear_proj", "mlp.linear_fc2") * 2
    ]
    for partials in saved.partials:
        assert partials.dtype == torch.bfloat16 and partials.isfinite().all()
        assert len({rank.float().norm().item() for rank in partials}) == 3  # each rank's own
    made = list(saved_partials.chain(saved, "cpu"))
    assert [saved_partials.digest(one) for one in made] == saved.digests
    last = made[-1]  # 4 bits are close to the sum, with what was owed before
    sent = saved.partials[-1].float().sum(dim=0) + made[-2]["carries"].float().sum(dim=0)
    assert (last["sum"] - sent).norm() < 0.2 * sent.norm()


def test_of_nothing(tmp_path):
    path = tmp_path / "partials.safetensors"
    (line,) = run(sys.executable, "-c", CODE, tmp_path / "none", path, status=1).stderr.splitlines()
    assert str(tmp_path / "none") in line and not path.exists()
