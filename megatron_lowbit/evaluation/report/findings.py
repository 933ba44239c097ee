"""What follows from the numbers: the headline and the sync points that stand out.

Only comparisons of numbers that were measured; where one is missing the finding is None.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_lowbit.evaluation.evaluation_schema import (
    Evaluation,
    Number,
    PointError,
    SyncPoints,
    Text,
    TextResult,
    Variant,
)
from megatron_lowbit.evaluation.measures.sync_error import BELOW_MEDIAN_DB, LOW_DB
from megatron_lowbit.evaluation.report.style import family_of

BUDGET = 4.2  # bits a value: the paper's
PAPER = "static-hybrid"


@dataclass(frozen=True)
class Ratio:
    """A quotient and its standard error; the parts' errors are combined as if independent."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Comparison:
    """The codec of the least KL within the budget on one text, by one collective, and its result.

    Beside it the result of the paper's method, by the same collective within the same budget.
    """

    text: Text
    variant: Variant
    result: TextResult
    paper: TextResult | None

    @property
    def is_paper(self) -> bool:
        """Whether the paper's method itself is the best."""
        return self.paper is self.result

    def ratio(self, metric: str) -> Ratio | None:
        """The best's ``delta_nll`` or ``kl`` over that of the paper's method.

        None where it is the paper's method, or either is missing or not above zero.
        """
        if self.paper is None or self.is_paper:
            return None
        above, below = getattr(self.result, metric), getattr(self.paper, metric)
        if above is None or below is None or above <= 0 or below <= 0:
            return None
        errors = [getattr(one, f"{metric}_stderr") for one in (self.result, self.paper)]
        value = above / below
        if None in errors:
            return Ratio(value, None)
        return Ratio(value, value * math.hypot(errors[0] / above, errors[1] / below))


def compare(evaluation: Evaluation) -> list[Comparison]:
    """A comparison for each text and each collective that has a codec within the budget."""
    found = []
    for collective in dict.fromkeys(variant.collective for variant in evaluation.variants):
        for text in evaluation.texts:
            within = [
                (evaluation.variant(result.variant), result)
                for result in text.results
                if _within(evaluation.variant(result.variant), collective) and result.kl is not None
            ]
            if within:
                variant, best = min(within, key=lambda pair: _kl(pair[1]))
                papers = [result for one, result in within if _is_papers(one.name)]
                paper = min(papers, key=_kl, default=None)
                found.append(Comparison(text, variant, best, paper))
    return found


def _is_papers(name: str) -> bool:
    """With error feedback it is the paper's method no more."""
    return family_of(name) == PAPER and "@feedback" not in name


def _kl(result: TextResult) -> float:
    assert result.kl is not None, "asked for before"
    return result.kl


def _within(variant: Variant, collective: str) -> bool:
    """Whether it can be the best: candidates that were not kept are no codecs to choose."""
    bits = variant.bits_per_value
    affordable = bits is not None and bits <= BUDGET
    return variant.collective == collective and affordable and family_of(variant.name) != "try"


@dataclass(frozen=True)
class CodecError:
    """The quantization error of a codec over all sync points.

    Attributes:
        codec: Its name.
        median: Of the sync points' SQNR, dB.
        worst: The sync point of the least SQNR.
        worst_token: The sync point of the least SQNR of a token; None where none is known.
        extreme: The sync points that stand out, worst first.
        missing: How many sync points have no finite SQNR.
    """

    codec: str
    median: float
    worst: PointError
    worst_token: PointError | None
    extreme: list[PointError]
    missing: int


def codec_errors(measured: SyncPoints) -> list[CodecError]:
    """A `CodecError` for each codec that has a finite SQNR anywhere."""
    errors = []
    for codec in dict.fromkeys(codec for point in measured.points for codec in point.sqnr):
        points = _known((point.sqnr.get(codec), point) for point in measured.points)
        if not points:
            continue
        tokens = _known((point.worst_token_sqnr.get(codec), point) for point in measured.points)
        median = statistics.median(sqnr for sqnr, _ in points)
        floor = max(median - BELOW_MEDIAN_DB, LOW_DB)
        errors.append(
            CodecError(
                codec=codec,
                median=median,
                worst=points[0][1],
                worst_token=tokens[0][1] if tokens else None,
                extreme=[point for sqnr, point in points if sqnr < floor],
                missing=len(measured.points) - len(points),
            )
        )
    return errors


def _known(found: Iterable[tuple[Number, PointError]]) -> list[tuple[float, PointError]]:
    """What has a value, the least first."""
    known = [(value, point) for value, point in found if value is not None]
    return sorted(known, key=lambda pair: pair[0])
