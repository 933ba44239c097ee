"""What codecs make of the calibrated variances of a sync point's features."""

import torch
from torch import Tensor

from megatron_lowbit.codecs.tables import Statistics, check_by_rank
from megatron_lowbit.errors import LowbitError

# A feature that calibration saw (nearly) constant is not blown up without limit.
_LEAST = 1e-6  # of the mean over features
# Weights that rest on a poor text must stay sane. The bound is beyond what a real text gives:
# SmolLM2-135M on Emma, TP 3, has at most 2.9 (shaped-hybrid, with any number of BF16 features) and
# 10.1 (scaled-hybrid, with its default); on "the the the" there are variances of zero.
MOST_COST = 16.0  # 12 dB


def calibrated(statistics: Statistics | None, hidden: int, codec: str) -> Tensor:
    """The variances, fp32 ``[ranks, hidden]``.

    Raises:
        LowbitError: There are none, or variances or means have another shape; it names `codec`.
    """
    if statistics is None or statistics.variance is None:
        raise LowbitError(
            f"{codec} needs calibrated statistics: take them from a calibration index (python -m "
            "megatron_lowbit calibrate makes one), or use rotated-hybrid, which needs none"
        )
    for name, values in (("variances", statistics.variance), ("means", statistics.mean)):
        if values is not None:
            check_by_rank(name, values, hidden)
    return statistics.variance.float()


def relative(variance: Tensor, body: Tensor, power: float) -> Tensor:
    """fp32 ``[..., hidden]`` in units of the mean over features, what is small raised.

    Weights of variance^(-power) are best on data of these variances; on data whose features are
    all alike they multiply the noise by mean(v^(-2 power)) mean(v^(2 power)). Where that is
    beyond `MOST_COST` the small variances, which rest on least, are raised until it is not.

    Args:
        variance: fp32 ``[..., hidden]``.
        body: int64 ``[n]``, the features that are quantized.
        power: Of the weights.
    """
    share = variance / variance.mean(dim=-1, keepdim=True)
    # All zero, or beyond fp32: nothing to go by.
    share = torch.where(share.isfinite(), share, 1).clamp_min(_LEAST)
    least = torch.full_like(share[..., :1], _LEAST)
    while bool((beyond := _cost(share[..., body], power) > MOST_COST).any()):
        least = torch.where(beyond, 4 * least, least)
        share = torch.maximum(share, least)
    return share


def _cost(share: Tensor, power: float) -> Tensor:
    """``[..., 1]``: what such weights multiply the noise by where all features are alike."""
    if not share.shape[-1]:
        return share.new_zeros((*share.shape[:-1], 1))
    powers = (share.double() ** sign for sign in (2 * power, -2 * power))
    one, other = (values.mean(dim=-1, keepdim=True) for values in powers)
    return one * other
