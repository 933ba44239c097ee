"""A fork's own row-parallel linear by a route that it registers."""

from pathlib import Path

import pytest
import torch
from forks import forked
from releases import NEWEST, OLDER, environment
from routes_worker import CHECKS, DownRoute

import megatron_lowbit
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.sums import routes

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=[OLDER[0], NEWEST])
def ranks(request, tmp_path_factory) -> list[dict[str, str]]:
    """By check, what it raised on each of 2 ranks."""
    out = tmp_path_factory.mktemp("routes")
    done = forked(2, HERE / "routes_worker.py", out, env=environment(request.param))
    assert all((out / f"rank{rank}.pt").exists() for rank in range(2)), done.stderr[-4000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("check", CHECKS)
def test_routes(ranks, check):
    """Each is a function of routes_worker.py, which asserts in the ranks."""
    for rank in ranks:
        assert check in rank, "it did not run: one before it failed"
        assert not rank[check], rank[check]


@pytest.mark.parametrize(
    ("route", "in_chain", "message"),
    [
        (DownRoute, True, "is no route: it is a class: give an instance"),
        (object(), True, "is no route: it has no takes, obstacle, is_muted, group, attach"),
        (DownRoute(), 1, "in_chain=1: say True or False"),
    ],
)
def test_what_is_no_route_is_refused(route, in_chain, message):
    with pytest.raises(LowbitError, match=message):
        megatron_lowbit.register_route(route, in_chain=in_chain)
    assert routes._registered == []


def test_one_of_a_class_is_enough():
    undo = megatron_lowbit.register_route(DownRoute(), in_chain=True)
    with pytest.raises(LowbitError, match="a DownRoute is registered already"):
        megatron_lowbit.register_route(DownRoute(), in_chain=False)
    undo()
    undo()
    megatron_lowbit.register_route(DownRoute(), in_chain=False)()
    assert routes._registered == []
