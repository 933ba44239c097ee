"""Scores of vocabulary-parallel logits against torch on the whole vocabulary."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_lowbit.comm.traffic import Choice, Counters, Traffic
from megatron_lowbit.evaluation import language_model as lm
from megatron_lowbit.evaluation.compare import Variant, compare

TOKENS, VOCAB, PADDED = 40, 20, 24
SEQUENCES = torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(3))


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


def _compare(rank: int) -> tuple:
    """A model whose logits are a table; the variant adds noise to it. Ranks are data parallel."""
    weights = torch.randn(VOCAB, PADDED, generator=torch.Generator().manual_seed(1))
    noise = 0.0

    def logits(tokens):
        return weights[tokens] + noise * weights[tokens].flip(1)

    @contextlib.contextmanager
    def active(level):
        nonlocal noise
        noise = level
        yield
        noise = 0.0

    counters = Counters(calls=1, tokens=10, values=1000, payload_bytes=500, sent_bytes=2000)
    traffic = [Traffic({Choice("one-shot", "fixed"): counters}) for _ in range(2)]
    variants = [Variant(str(n), lambda n=n: active(n), traffic) for n in (0.0, 0.1, 0.5)]
    mine = dist.new_subgroups(1)[0]  # each rank is a tensor-parallel group of its own
    return compare(
        SEQUENCES, logits, variants, vocab_size=VOCAB, tp_group=mine, dp_group=dist.group.WORLD
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_comparison(ranks, tmp_path):
    for native, results in run_ranks(ranks, _compare, tmp_path):
        assert native["tokens"] == 3 * 8
        same, little, much = results
        assert same["kl"] == same["delta_nll"] == 0
        assert same["top1"] == 1
        assert same["perplexity"] == native["perplexity"]
        assert 0 < little["kl"] < much["kl"]
        assert same["bits_per_value"] == 4
        assert same["wire_bytes_per_token"] == 400
