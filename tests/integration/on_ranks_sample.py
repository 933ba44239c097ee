"""Tests of ranks that end in every way; test_on_ranks.py has them run, by name."""

import atexit
import os

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.on_ranks(2)


def summed(value: float) -> float:
    total = torch.tensor(value)
    dist.all_reduce(total)
    return total.item()


@pytest.fixture(scope="module")
def started():
    return os.getpid()


def test_a_sum(started):
    assert summed(1.0 + dist.get_rank()) == 3


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_wrong_on_all_ranks(value):
    assert summed(value) == 2, "of two"


def test_wrong_on_one_rank_while_the_other_waits():
    assert dist.get_rank() == 0, "not mine"
    summed(1.0)


def test_a_skip():
    pytest.skip("no reason")


def test_a_rank_that_ends():
    summed(1.0)
    if dist.get_rank() == 1:
        print("farewell", flush=True)
        os._exit(3)
    summed(1.0)


def test_a_fixture_is_made_once_in_a_group(started):
    assert started == os.getpid()
    assert summed(1.0) == 2


@pytest.mark.on_ranks(1)
def test_a_rank_that_fails_at_its_end():
    atexit.register(os._exit, 3)
