"""How much a codec changes a language model: scores of next-token distributions.

All functions take vocabulary-parallel logits, ``[tokens, vocabulary / ranks]`` of each rank of a
tensor-parallel group, and never gather them; every rank ends with the same scores. Where
torch.distributed is not initialized, `group` is None and the one process has the whole vocabulary.
"""

import torch
import torch.distributed as dist
from torch import Tensor

# Tokens at a time: at 49,152 entries what lies between is 3 MB, which stays in the cache; all 512
# of a sequence at once cost up to twice the time.
_ROWS = 16


def log_softmax(logits: Tensor, *, vocab_size: int, group: dist.ProcessGroup | None) -> Tensor:
    """fp32 log-probabilities of this rank's part of the vocabulary.

    Args:
        logits: ``[tokens, part]``; part r of the vocabulary is on rank r of `group`.
        vocab_size: Size without padding; what lies beyond gets minus infinity.
        group: The tensor-parallel group.
    """
    logits = logits.float()
    real = max(vocab_size - _rank(group) * logits.shape[1], 0)  # entries, on this rank
    if real < logits.shape[1]:
        beyond = torch.arange(logits.shape[1], device=logits.device) >= real
        logits = logits.masked_fill(beyond, -torch.inf)
    own = torch.cat([rows.logsumexp(dim=1, keepdim=True) for rows in logits.split(_ROWS)])
    largest = own.clone()
    _all_reduce(largest, group, dist.ReduceOp.MAX)
    total = (own - largest).exp()
    _all_reduce(total, group)
    return logits - (largest + total.log())


def negative_log_likelihood(
    log_probs: Tensor, targets: Tensor, *, group: dist.ProcessGroup | None
) -> Tensor:
    """fp32 ``[tokens]``, in nats, of int64 `targets` ``[tokens]``."""
    part = log_probs.shape[1]
    local = targets - _rank(group) * part
    mine = (local >= 0) & (local < part)
    picked = log_probs.gather(1, local.clamp(0, part - 1)[:, None])[:, 0]
    nll = torch.where(mine, -picked, 0)
    _all_reduce(nll, group)
    return nll


def kl_divergence(
    reference: Tensor, log_probs: Tensor, *, group: dist.ProcessGroup | None
) -> Tensor:
    """fp32 ``[tokens]``, in nats: KL(reference || other), both as log-probabilities."""
    kl = torch.cat(
        [_kl(p, q) for p, q in zip(reference.split(_ROWS), log_probs.split(_ROWS), strict=True)]
    )
    _all_reduce(kl, group)
    return kl


def _kl(reference: Tensor, log_probs: Tensor) -> Tensor:
    terms = reference.exp() * (reference - log_probs)
    return torch.where(reference == -torch.inf, 0, terms).sum(dim=1)


def top1(log_probs: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """int64 ``[tokens]``: the most likely token; of equals the first."""
    best, entry = log_probs.max(dim=1)
    if not dist.is_initialized():
        return entry
    entry = entry + _rank(group) * log_probs.shape[1]
    ranks = dist.get_world_size(group)
    all_best = [torch.empty_like(best) for _ in range(ranks)]
    all_entries = [torch.empty_like(entry) for _ in range(ranks)]
    dist.all_gather(all_best, best, group=group)
    dist.all_gather(all_entries, entry, group=group)
    winner = torch.stack(all_best).argmax(dim=0, keepdim=True)
    return torch.stack(all_entries).gather(0, winner)[0]


def log_likelihood_gradient(
    logits: Tensor, targets: Tensor, *, group: dist.ProcessGroup | None
) -> Tensor:
    """The gradient of the summed log-likelihood of `targets` with respect to `logits`.

    Args:
        logits: fp32 ``[tokens, part]``, as for `log_softmax`; padding as small as can be.
        targets: int64 ``[tokens]``.
        group: The tensor-parallel group.

    Returns:
        fp32 ``[tokens, part]``: one at the target, minus the probabilities. The operations are
        those of megatron-core's vocab_parallel_cross_entropy, and so are the bits.
    """
    largest = logits.max(dim=1, keepdim=True).values
    _all_reduce(largest, group, dist.ReduceOp.MAX)
    gradient = (logits - largest).exp()
    total = gradient.sum(dim=1, keepdim=True)
    _all_reduce(total, group)
    gradient /= total
    local = targets - _rank(group) * logits.shape[1]
    mine = ((local >= 0) & (local < logits.shape[1])).nonzero()[:, 0]
    gradient[mine, local[mine]] -= 1
    return -gradient


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _all_reduce(values: Tensor, group: dist.ProcessGroup | None, op=dist.ReduceOp.SUM) -> None:
    if dist.is_initialized():
        dist.all_reduce(values, op=op, group=group)
