"""What options cost, as a calibration index keeps it: fp64 ``[options]`` by name and sync point."""

from collections.abc import Mapping
from dataclasses import astuple

import torch
from torch import Tensor

from megatron_lowbit.calibration.plan import Cost, Option
from megatron_lowbit.calibration.recipe import Assignment

# As in `plan.Cost`. The second is missing where there was no feedback yet, and all that follows
# where no bits of sums were planned.
COSTS = ("divergence", "divergence_carried", "handed_on")
SUM_COSTS = ("sum_divergence", "sum_divergence_carried", "sum_handed_on")
MISSED = "missed"


def stored(options: list[Option]) -> dict[str, Tensor]:
    """What is kept of the options of a sync point, by name."""
    kept = {MISSED: _fp64([option.missed for option in options])}
    both: dict[tuple[str, ...], list[Cost | None]] = {
        COSTS: [option.cost for option in options],
        SUM_COSTS: [option.of_sum for option in options],
    }
    for names, costs in both.items():
        columns = zip(*(astuple(cost) for cost in costs if cost is not None), strict=True)
        kept.update(zip(names, map(_fp64, columns), strict=True))
    return kept


def options_of(
    assignments: list[tuple[Assignment, float]], tensors: Mapping[str, Tensor | None]
) -> list[Option]:
    """The options again.

    Args:
        assignments: Each with its bits a value.
        tensors: From `stored`, or what an older index has of them.
    """
    costs, of_sums = _costs(COSTS, tensors), _costs(SUM_COSTS, tensors)
    known = tensors[MISSED]
    missed = [0.0] * len(costs) if known is None else known.tolist()
    return [
        Option(*assignment, costs[n], missed[n], of_sums[n] if of_sums else None)
        for n, assignment in enumerate(assignments)
    ]


def _costs(names: tuple[str, ...], tensors: Mapping[str, Tensor | None]) -> list[Cost]:
    found = [tensor.tolist() for name in names if (tensor := tensors[name]) is not None]
    return [Cost(*of_one) for of_one in zip(*found, strict=True)]


def _fp64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
