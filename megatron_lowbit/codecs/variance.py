"""What codecs make of the calibrated variances of a sync point's features."""

import torch
from torch import Tensor

from megatron_lowbit.codecs.tables import Statistics
from megatron_lowbit.errors import LowbitError

# A feature that calibration saw (nearly) constant is not blown up without limit.
_LEAST = 1e-6  # of the mean over features


def calibrated(statistics: Statistics | None, hidden: int, codec: str) -> Tensor:
    """The variances, fp32 ``[ranks, hidden]``, or an error that names the codec."""
    if statistics is None or statistics.variance is None:
        raise LowbitError(
            f"{codec} needs calibrated statistics: pass an index made by tools/calibrate.py, or "
            "use rotated-hybrid, which needs none"
        )
    for name, values in (("variances", statistics.variance), ("means", statistics.mean)):
        if values is not None and (values.ndim != 2 or values.shape[1] != hidden):
            raise LowbitError(
                f"{name} have shape {tuple(values.shape)}, not [ranks, hidden] with hidden {hidden}"
            )
    return statistics.variance.float()


def relative(variance: Tensor) -> Tensor:
    """fp32 ``[..., hidden]`` in units of the mean over features, at least a millionth of it."""
    share = variance / variance.mean(dim=-1, keepdim=True)
    # All zero, or beyond fp32: nothing to go by.
    return torch.where(share.isfinite(), share, 1).clamp_min(_LEAST)
