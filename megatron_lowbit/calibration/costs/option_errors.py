"""The errors of every option of a recipe, by really encoding and decoding.

Partials are those of native runs, and so is the sum that two-shot quantizes again: an option is
measured on what it would meet if all else were exact.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.calibration.plan import SKIP
from megatron_lowbit.calibration.recipe import Assignment
from megatron_lowbit.model.stages import Stages
from megatron_lowbit.model.summing import Summing

PARTIALS, SUMS = range(2)  # what is quantized
PLAIN, CARRIED, HANDED_ON = range(3)  # how what it costs is counted, as in `calibration.plan.Cost`


@dataclass
class Costs:
    """What options cost, summed over tokens.

    Attributes:
        nats: fp64 ``[2, 3, points, options]``: of `PARTIALS` and `SUMS`; `PLAIN`, `CARRIED` and
            `HANDED_ON`.
        missed: fp64 ``[2, points, options]``: the share of a token's energy that is missed, of
            partials and of sums.
    """

    nats: Tensor
    missed: Tensor

    @classmethod
    def zeros(cls, points: int, options: int) -> "Costs":
        """Nothing yet."""
        shape = (points, options)
        return cls(
            torch.zeros(2, 3, *shape, dtype=torch.float64),
            torch.zeros(2, *shape, dtype=torch.float64),
        )

    def over(self, stages: Stages) -> "Costs":
        """All pipeline stages' together: each has those of its own sync points, and zeros."""
        nats, missed = zip(*stages.gather((self.nats, self.missed)), strict=True)
        return Costs(sum_of(nats), sum_of(missed))


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """Their sum, in order."""
    return torch.stack(list(parts)).sum(dim=0)


class OptionErrors:
    """The errors of each option at this stage's sync points; every rank of a group calls it alike.

    Args:
        summing: How the model sums.
        index: Calibrated statistics.
        assignments: The options, `plan.SKIP` first.
    """

    def __init__(self, summing: Summing, index: CalibrationIndex, assignments: list[Assignment]):
        assert assignments[0] == SKIP, "what all others are compared with comes first"
        self._summing, self._assignments = summing, assignments
        self._codecs = [assignment.make() for assignment in assignments]
        points, ranks = summing.points, summing.ranks
        self._tables = [[index.tables_at(p, a, ranks) for p in points] for a in assignments]
        self._reducers = [
            summing.reducers([codec] * len(points), tables, "one-shot")
            for codec, tables in zip(self._codecs, self._tables, strict=True)
        ]

    def at(self, number: int, partial: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number of the option, error of the partials' sum, error of the sum's own encoding).

        Both fp64 ``[tokens, hidden]``. The first option, which sends nothing, misses all but the
        calibrated mean.

        Args:
            number: Of the sync point, on this stage.
            partial: What it has here.
        """
        exact = self._summing.exact(self._summing.points[number], partial).flatten(0, -2)
        mean = self._tables[0][number].center_sum
        missed = -exact if mean is None else mean - exact
        yield 0, missed.double(), torch.zeros_like(missed, dtype=torch.float64)
        for column in range(1, len(self._assignments)):
            tables, codec = self._tables[column][number], self._codecs[column].for_sum()
            # Reducers may sum in place.
            total = self._reducers[column][number](partial.clone(), False).flatten(0, -2)
            of_sum = codec.sum_tables(tables)
            again = codec.decode_sum(codec.encode(exact, of_sum)[None], of_sum)
            yield column, (total.float() - exact).double(), (again - exact).double()


def shares(errors: Tensor, energy: Tensor) -> Tensor:
    """fp64 scalar: the share of each token's energy that is missed, summed over tokens.

    By token, and never more than all of it, since a few tokens of some models have nearly all the
    energy.

    Args:
        errors: fp64 ``[tokens]``, squares.
        energy: fp64 ``[tokens]``, squares of what the calibrated mean does not know.
    """
    return torch.where(energy > 0, errors / energy, 0).clamp(max=1).sum().cpu()
