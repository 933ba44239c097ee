"""What no data can give: statistics that a file claims and that no calibration can have made.

All bounds hold for any partials whatever, but for rounding. Of a feature let sequence s of n, of T
tokens each, have the minimum m_s, maximum M_s, mean a_s and mean of squares q_s. The mean a and the
mean of squares q are over all tokens; the minimum m and the maximum M are moving averages over
sequences with weights w_s (`calibration.statistics`), of which none is above max(0.99^(n-1), 0.01).
With K^2 = n max(w_s), which is at most max(37, n / 100):

- m <= M, and a^2 <= q (Cauchy and Schwarz).
- m <= a + K d and M >= a - K d, where d^2 = q - a^2. For m - a <= sum w_s (a_s - a), by Cauchy and
  Schwarz at most sqrt(sum w_s (a_s - a)^2) <= K sqrt(sum (a_s - a)^2 / n), and the variance of the
  sequences' means is at most that of all tokens. (The mean alone need not be within m and M: it
  gives all sequences the same weight.)
- |m| and |M| are at most K sqrt(T q), since one token is at most the root of its sequence's T q_s.
"""

import math

import torch
from torch import Tensor

from megatron_lowbit.calibration.validation.index_schema import Corpus

_MOST = 1e14  # of a value; its square, summed over ranks and features, is far below fp32's largest
_ROUNDING = 1e-4  # relative, of a mean of squares: sums over a sequence are in fp32
_FLUSHED = 2e-38  # a smaller square may have been rounded to zero
_UNKNOWN = Corpus(sequences=1_000_000, seq_length=1 << 20)


def impossible(low: Tensor, high: Tensor, mean: Tensor, square: Tensor, corpus: Corpus) -> str:
    """What is impossible about the statistics of one sync point, or of its sum; else nothing.

    Args:
        low: Finite fp32, minima; all four of the same shape.
        high: Maxima.
        mean: Means.
        square: Means of squares.
        corpus: How many sequences there were, and how long.
    """
    names = ("minimum", "maximum", "mean", "second moment")
    low, high, mean, square = values = [value.double() for value in (low, high, mean, square)]
    for name, value, most in zip(names, values, (_MOST, _MOST, _MOST, _MOST**2), strict=True):
        if bool((value.abs() > most).any()):
            return f"{name} {value.abs().max():.3g} is beyond {most:g}, which no table can hold"
    n, length = (getattr(corpus, k) or getattr(_UNKNOWN, k) for k in ("sequences", "seq_length"))
    times = math.sqrt(max(37.0, n / 100))
    variance = (square - mean.square()).clamp_min(0) + _ROUNDING * square + _FLUSHED
    reach = times * variance.sqrt()
    largest = times * (length * (1 + _ROUNDING) * square + length * _FLUSHED).sqrt()
    absolute = torch.maximum(low.abs(), high.abs())
    least = mean.square() - _ROUNDING * square.abs() - _FLUSHED
    checks = {
        "second moment is negative": square < 0,
        "minimum is above the maximum": low - high > 1e-6 * absolute,
        "second moment is below the mean's square": square < least,
        "mean is outside the range of the values": (low > mean + reach) | (high < mean - reach),
        "range is beyond what the second moment allows": absolute > largest,
    }
    for text, wrong in checks.items():
        if bool(wrong.any()):
            feature = int(wrong.nonzero()[0, -1])
            return f"{text} at feature {feature}, which no data can give"
    return ""
