"""Messages of more than 2**31 values: offsets are int64 everywhere."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_each_rank

from megatron_lowbit.comm import all_reduce, transport
from megatron_lowbit.comm.transport import chunks

HIDDEN = 8192
TOKENS = (1 << 31) // HIDDEN + 3


@pytest.mark.slow
@on_each_rank(2)
def test_more_than_2_31_values(rank):
    """4.3 GB of BF16 a rank, all rows alike, so that one row is all that must be known."""
    row = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(rank)).bfloat16()
    few = all_reduce(row.expand(5, HIDDEN), collective="two-shot")
    many = all_reduce(row.expand(TOKENS, HIDDEN), collective="two-shot")
    assert many.shape == (TOKENS, HIDDEN)
    assert all((part == few[0]).all() for part in many.split(1 << 14))


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


@on_each_rank(2)
def test_the_workspace_does_not_grow_with_the_message(rank):
    """At 2 ranks a chunk is 8192 values, 4352 bytes at 4.25 bits: buffers of 8 KB, 2 x 4 slots."""
    transport.CHUNK_VALUES = 1 << 12
    sizes = []
    for chunk_count in (2, 20, 200):
        all_reduce(torch.randn(chunk_count * 2 * (1 << 12) // 64, 64), collective="two-shot")
        buffers = transport._workspaces[dist.group.WORLD].values()
        sizes.append(sum(buffer.numel() for buffer in buffers))
    assert sizes[0] <= sizes[1] == sizes[2] <= 2 * 4 * 8192
