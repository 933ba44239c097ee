"""`ranks.on_each_rank`: the body of a test runs in every rank, with what the test asks for."""

import pytest
import torch.distributed as dist
from ranks import on_each_rank
from torch.multiprocessing import ProcessRaisedException


@pytest.mark.parametrize("word", ["a"])
@on_each_rank(1, 2)
def test_what_a_test_asks_for(rank, ranks, word, tmp_path):
    assert (rank, word) == (dist.get_rank(), "a") and ranks == dist.get_world_size()
    assert (tmp_path / "ranks" / "store").exists()


@on_each_rank(2)
def holds_on_the_first_rank(rank):
    assert rank == 0


def test_one_rank_that_fails_is_enough(tmp_path):
    with pytest.raises(ProcessRaisedException, match="AssertionError"):
        holds_on_the_first_rank(2, tmp_path)
