"""Messages of more than 2**31 values: offsets are int64 everywhere."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_lowbit.comm import all_reduce, transport
from megatron_lowbit.comm.transport import chunks

HIDDEN = 8192
TOKENS = (1 << 31) // HIDDEN + 3


def _reduce(rank: int) -> dict:
    row = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(rank)).bfloat16()
    few = all_reduce(row.expand(5, HIDDEN), collective="two-shot")
    many = all_reduce(row.expand(TOKENS, HIDDEN), collective="two-shot")
    same = all(bool((part == few[0]).all()) for part in many.split(1 << 14))
    return {"shape": tuple(many.shape), "same": same}


@pytest.mark.slow
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


def _workspace(rank: int) -> list[int]:
    """Bytes of receive buffers after messages of 2, 20 and 200 chunks."""
    transport.CHUNK_VALUES = 1 << 12
    sizes = []
    for chunk_count in (2, 20, 200):
        all_reduce(torch.randn(chunk_count * 2 * (1 << 12) // 64, 64), collective="two-shot")
        buffers = transport._workspaces[dist.group.WORLD].values()
        sizes.append(sum(buffer.numel() for buffer in buffers))
    return sizes


def test_the_workspace_does_not_grow_with_the_message(tmp_path):
    """At 2 ranks a chunk is 8192 values, 4352 bytes at 4.25 bits: buffers of 8 KB, 2 x 4 slots."""
    for first, second, third in run_ranks(2, _workspace, tmp_path):
        assert first <= second == third <= 2 * 4 * 8192
