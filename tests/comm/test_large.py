"""Messages of more than 2**31 values: offsets are int64 everywhere."""

import torch
from ranks import run_ranks

from megatron_lowbit.comm import all_reduce
from megatron_lowbit.comm.transport import chunks

HIDDEN = 8192
TOKENS = (1 << 31) // HIDDEN + 3


def _reduce(rank: int) -> dict:
    row = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(rank)).bfloat16()
    few = all_reduce(row.expand(5, HIDDEN), collective="two-shot")
    many = all_reduce(row.expand(TOKENS, HIDDEN), collective="two-shot")
    same = all(bool((part == few[0]).all()) for part in many.split(1 << 14))
    return {"shape": tuple(many.shape), "same": same}


def test_more_than_2_31_values(tmp_path):
    """4.3 GB of BF16 a rank, all rows alike, so that one row is all that must be known."""
    for result in run_ranks(2, _reduce, tmp_path):
        assert result == {"shape": (TOKENS, HIDDEN), "same": True}


def test_chunks_cover_every_token_once():
    for tokens, hidden, ranks in [
        ((1 << 31) + 1, 8192, 8),
        (0, 5, 3),
        (1, 5, 3),
        (10**6 + 1, 96, 7),
    ]:
        spans = chunks(tokens, hidden, ranks)
        edges = [0, *(stop for _, stop in spans)]
        assert [start for start, _ in spans] == edges[:-1]
        assert edges[-1] == tokens
