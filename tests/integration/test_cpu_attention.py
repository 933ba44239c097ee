"""The stand-ins for flash-attn's functions, against torch's own attention request by request."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_lowbit.integration.cpu.attention import (
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

HEADS, KEY_HEADS, DIM, BLOCK, BLOCKS = 6, 2, 8, 4, 12
SCALE = DIM**-0.5
# New tokens and keys of each request; the last has no keys, as padding has none.
REQUESTS = [(5, 5), (1, 9), (3, 8), (0, 0)]


def _pages(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values, and a block table that shuffles the blocks."""
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, BLOCKS, BLOCK, KEY_HEADS, DIM, generator=generator)
    free = torch.randperm(BLOCKS, generator=generator).tolist()
    table = torch.zeros(len(lengths), max(lengths) // BLOCK + 1, dtype=torch.int32)
    for row, length in zip(table, lengths, strict=True):
        for at in range(-(-length // BLOCK)):
            row[at] = free.pop()
    return k, v, table


def _expected(q, k, v, blocks, length: int, window: tuple[int, int]) -> torch.Tensor:
    keys, values = (
        cache[blocks.long()].flatten(0, 1)[:length].repeat_interleave(HEADS // KEY_HEADS, 1)
        for cache in (k, v)
    )
    own = torch.arange(length - len(q), length)[:, None]
    distance = torch.arange(length) - own
    seen = distance <= window[1] if window[1] >= 0 else torch.ones_like(distance).bool()
    if window[0] >= 0:
        seen &= distance >= -window[0]
    q, keys, values = (x.transpose(0, 1) for x in (q, keys, values))
    return scaled_dot_product_attention(q, keys, values, seen, scale=SCALE).transpose(0, 1)


@pytest.mark.parametrize("window", [(-1, -1), (3, 0), (2, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_mixed_lengths(window, causal):
    k, v, table = _pages([length for _, length in REQUESTS])
    tokens = [new for new, _ in REQUESTS]
    q = torch.randn(sum(tokens) + 2, HEADS, DIM)  # two of padding
    starts = torch.tensor([0, *tokens]).cumsum(0)
    key_starts = torch.tensor([0, *(length for _, length in REQUESTS)]).cumsum(0)
    limits = {"softmax_scale": SCALE, "causal": causal, "window_size": window}
    out, sums, _ = flash_attn_varlen_func(
        q, k, v, starts, key_starts, 5, 9, block_table=table, return_attn_probs=True, **limits
    )
    seen = (window[0], 0) if causal else window
    for (new, length), start, blocks in zip(REQUESTS, starts.tolist(), table, strict=False):
        if new:
            mine = q[start : start + new]
            expected = _expected(mine, k, v, blocks, length, seen)
            torch.testing.assert_close(out[start : start + new], expected)
    assert (out[starts[-1] :] == 0).all()
    assert sums.shape == (HEADS, len(q))
    assert (sums[:, starts[-1] :] == -torch.inf).all()


def test_decoding_with_several_tokens_a_request():
    lengths = [9, 4, 0]
    k, v, table = _pages(lengths)
    q = torch.randn(3, 2, HEADS, DIM)
    cache = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32), "block_table": table}
    out, sums = flash_attn_with_kvcache(
        q, k, v, **cache, softmax_scale=SCALE, causal=True, return_softmax_lse=True
    )
    for at, length in enumerate(lengths[:2]):
        expected = _expected(q[at], k, v, table[at], length, (-1, 0))
        torch.testing.assert_close(out[at], expected)
    assert (out[2] == 0).all(), "padding"
    assert sums.shape == (3, HEADS, 2)


def test_the_sums_are_those_of_the_softmax():
    """One key: the logarithm of the sum is its score."""
    k, v, table = _pages([1])
    q = torch.randn(1, 1, HEADS, DIM)
    cache = {"cache_seqlens": torch.tensor([1]), "block_table": table}
    _, sums = flash_attn_with_kvcache(
        q, k, v, **cache, softmax_scale=SCALE, causal=True, return_softmax_lse=True
    )
    key = k[table[0, 0].long(), 0].repeat_interleave(HEADS // KEY_HEADS, 0)
    torch.testing.assert_close(sums[0, :, 0], (q[0, 0] * key).sum(-1) * SCALE)
