"""Scores of vocabulary-parallel logits against torch on the whole vocabulary."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_lowbit.model import logits as lm

TOKENS, VOCAB, PADDED = 40, 20, 24


def _logits(seed: int) -> torch.Tensor:
    return 5 * torch.randn(TOKENS, PADDED, generator=torch.Generator().manual_seed(seed))


def _targets() -> torch.Tensor:
    return torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(9))


def _scores(rank: int) -> dict:
    part = slice(*(torch.tensor([rank, rank + 1]) * PADDED // dist.get_world_size()).tolist())
    options = {"vocab_size": VOCAB, "group": None}
    first, second = (lm.log_softmax(_logits(seed)[:, part], **options) for seed in (0, 1))
    return {
        "nll": lm.negative_log_likelihood(first, _targets(), group=None),
        "kl": lm.kl_divergence(first, second, group=None),
        "top1": lm.top1(first, group=None),
    }


@pytest.mark.parametrize("ranks", [1, 3])
def test_scores(ranks, tmp_path):
    first, second = (torch.log_softmax(_logits(seed)[:, :VOCAB], dim=1) for seed in (0, 1))
    for scores in run_ranks(ranks, _scores, tmp_path):
        expected = -first.gather(1, _targets()[:, None])[:, 0]
        torch.testing.assert_close(scores["nll"], expected, rtol=1e-5, atol=1e-5)
        kl = (first.exp() * (first - second)).sum(dim=1)
        torch.testing.assert_close(scores["kl"], kl, rtol=1e-5, atol=1e-5)
        assert torch.equal(scores["top1"], first.argmax(dim=1))
