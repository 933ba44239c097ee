"""How wide the features of each sync point are, from the index: quantiles and outliers.

The range of a feature is the one that chooses the BF16 features: R = 2 max(|min|, |max|) per rank,
summed over the ranks (arXiv:2411.07942, section 3).
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Point = TypeVar("Point")  # whatever has a `layer` and a `name`
LEVELS = (0.5, 0.9, 0.99, 1.0)
LEVEL_NAMES = ("median", "90 %", "99 %", "max")


@dataclass(frozen=True)
class PointRanges:
    """The features of one sync point.

    Attributes:
        layer: From 1, over all pipeline stages.
        name: Such as ``mlp.linear_fc2``.
        ranges: ``[hidden]``, summed over ranks.
        bf16_index: ``[k]``, the features that travel in BF16.
    """

    layer: int
    name: str
    ranges: Tensor
    bf16_index: Tensor

    @property
    def quantiles(self) -> list[float]:
        """Of the features' ranges, at `LEVELS`."""
        return torch.quantile(self.ranges.double(), torch.tensor(LEVELS).double()).tolist()

    @property
    def chosen(self) -> list[float]:
        """The ranges of the BF16 features."""
        return self.ranges[self.bf16_index.long()].tolist()

    @property
    def outlier(self) -> tuple[int, float, float]:
        """The widest feature, its range, and how many times the median it is."""
        feature = int(self.ranges.argmax())
        widest, median = float(self.ranges[feature]), self.quantiles[0]
        return feature, widest, widest / median if median > 0 else float("inf")

    @property
    def left(self) -> float:
        """The widest feature that is quantized, as a multiple of the median."""
        body = self.ranges.clone()
        body[self.bf16_index.long()] = 0
        median = self.quantiles[0]
        return float(body.max()) / median if median > 0 else float("inf")


def by_kind(points: list[Point]) -> dict[str, list[Point]]:
    """Sync points by their name, each list by layer; attention before MLP, as in a layer."""
    kinds: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: (point.name.startswith("mlp"), point.layer)):
        kinds.setdefault(point.name, []).append(point)
    return kinds


def most_extreme(points: list[PointRanges], count: int) -> list[PointRanges]:
    """The sync points whose widest feature is the largest multiple of the median."""
    return sorted(points, key=lambda point: point.outlier[2], reverse=True)[:count]
