"""Error feedback inside Megatron, at TP 2 over Gloo on each supported release."""

from pathlib import Path

import pytest
import torch
from chains_worker import CHECKS
from forks import forked
from releases import RELEASES, environment, is_release

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=RELEASES)
def ranks(request, tmp_path_factory) -> list[dict[str, str]]:
    """By check, what it raised on each of 2 ranks."""
    out = tmp_path_factory.mktemp("chains")
    done = forked(2, HERE / "chains_worker.py", out, env=environment(request.param))
    assert all((out / f"rank{rank}.pt").exists() for rank in range(2)), done.stderr[-4000:]
    found = [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    assert is_release(found[0]["version"], request.param)
    return found


@pytest.mark.support("error feedback")
@pytest.mark.parametrize("check", CHECKS)
def test_chains(ranks, check):
    """Each is a function of chains_worker.py, which asserts in the ranks."""
    for rank in ranks:
        assert check in rank, "it did not run: one before it failed"
        assert not rank[check], rank[check]
