"""Standard errors of what measures report. Every function gives None where there is no error."""

import math
import statistics
from collections.abc import Sequence

_NORMAL_95 = 1.959963984540054  # half width of a 95 % interval, in standard errors


def mean(values: Sequence[float]) -> float:
    """The mean; NaN if a value is, or if there are infinities of both signs."""
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values)  # math.fsum would raise
    return math.fsum(values) / len(values)


def stderr(values: Sequence[float]) -> float | None:
    """Standard error of the mean: the sample deviation over sqrt(n); None for a single value.

    For zeros and ones it is sqrt(p (1 - p) / (n - 1)), which is what `mean_stderr` of
    EleutherAI's lm-evaluation-harness gives (lm_eval/api/metrics.py).
    """
    if len(values) < 2:
        return None
    # Two values that are not finite have no deviation: statistics.stdev would raise.
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def ratio_stderr(
    value: float,
    reference: float,
    *,
    value_error: float | None,
    reference_error: float | None,
    difference_error: float | None,
) -> float | None:
    """Standard error of ``value / reference``, two means over the same items, by the delta method.

    To first order ``value / reference`` moves by ``(d_value - ratio d_reference) / reference``. The
    covariance follows from the error of the paired difference:
    ``2 cov = var(value) + var(reference) - var(value - reference)``. All errors are standard
    errors, `difference_error` that of the mean of the per-item differences.
    """
    if value_error is None or reference_error is None or difference_error is None:
        return None
    if reference == 0:
        return None
    ratio = value / reference
    twice_covariance = value_error**2 + reference_error**2 - difference_error**2
    variance = value_error**2 + ratio**2 * reference_error**2 - ratio * twice_covariance
    return math.sqrt(max(variance, 0.0)) / abs(reference)  # rounding can make a zero negative


def interval_95(
    value: float | None, error: float | None
) -> tuple[float, float] | tuple[None, None]:
    """The normal 95 % confidence interval, low and high."""
    if value is None or error is None:
        return None, None
    return value - _NORMAL_95 * error, value + _NORMAL_95 * error
