"""Scores of vocabulary-parallel logits against torch on the whole vocabulary."""

import torch
import torch.distributed as dist
from ranks import on_each_rank

from megatron_lowbit.model import logits as lm

TOKENS, VOCAB, PADDED = 40, 20, 24


def _logits(seed: int) -> torch.Tensor:
    return 5 * torch.randn(TOKENS, PADDED, generator=torch.Generator().manual_seed(seed))


def _targets() -> torch.Tensor:
    return torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(9))


@on_each_rank(1, 3)
def test_scores(rank):
    part = slice(*(torch.tensor([rank, rank + 1]) * PADDED // dist.get_world_size()).tolist())
    options = {"vocab_size": VOCAB, "group": None}
    mine, other = (lm.log_softmax(_logits(seed)[:, part], **options) for seed in (0, 1))
    first, second = (torch.log_softmax(_logits(seed)[:, :VOCAB], dim=1) for seed in (0, 1))
    nll = lm.negative_log_likelihood(mine, _targets(), group=None)
    expected = -first.gather(1, _targets()[:, None])[:, 0]
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
    kl = (first.exp() * (first - second)).sum(dim=1)
    got = lm.kl_divergence(mine, other, group=None)
    torch.testing.assert_close(got, kl, rtol=1e-5, atol=1e-5)
    assert torch.equal(lm.top1(mine, group=None), first.argmax(dim=1))
