"""What the index says of each sync point: how wide its features are, and its recipe.

The range of a feature is the one that chooses the BF16 features: R = 2 max(|min|, |max|) per rank,
summed over the ranks (arXiv:2411.07942, section 3). A recipe gives each sync point its codec, bits
and number of BF16 features.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.evaluation.evaluation_schema import PointError

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


Point = TypeVar("Point", "PointRanges", "RecipePoint", PointError)


def point_ranges(index: CalibrationIndex) -> list[PointRanges]:
    """The features of all sync points."""
    return [
        PointRanges(layer, name, record.ranges.sum(dim=0), record.bf16_index)
        for layer, records in index.layers.items()
        for name, record in records.items()
    ]


def by_kind(points: list[Point]) -> dict[str, list[Point]]:
    """Sync points by their name, each list by layer; attention before MLP, as in a layer."""
    kinds: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: (point.name.startswith("mlp"), point.layer)):
        kinds.setdefault(point.name, []).append(point)
    return kinds


def most_extreme(points: list[PointRanges], count: int) -> list[PointRanges]:
    """The sync points whose widest feature is the largest multiple of the median."""
    return sorted(points, key=lambda point: point.outlier[2], reverse=True)[:count]


@dataclass(frozen=True)
class RecipePoint:
    """What one sync point travels in; None is what the codec leaves no choice about.

    Bits are those of partials, `sum_bits` those of sums, if they have others.
    """

    layer: int
    name: str
    codec: str
    bits: int | None
    bf16_features: int | None
    sum_bits: int | None = None

    @property
    def setting(self) -> "Setting":
        """All that the recipe says of it; bits of partials and of sums as ``4+6``."""
        pair = f"{self.bits}+{self.sum_bits}"
        return self.codec, self.bits if self.sum_bits is None else pair, self.bf16_features


Setting = tuple[str, int | str | None, int | None]


def recipe_points(index: CalibrationIndex) -> list[RecipePoint]:
    """The recipe, by layer; empty where there is none."""
    points = []
    for (layer, name), one in sorted((index.recipe or {}).items()):
        bits, of_sums = one.bits if isinstance(one.bits, tuple) else (one.bits, None)
        points.append(RecipePoint(layer, name, one.codec, bits, one.bf16_features, of_sums))
    return points


def runs(points: list[RecipePoint]) -> list[tuple[str, list[int], Setting]]:
    """The recipe in as few lines as it takes.

    A kind of sync point, layers that follow each other, and the one setting that it has in them.
    """
    found = []
    for name in dict.fromkeys(point.name for point in points):
        mine = enumerate(point for point in points if point.name == name)
        # Where layers follow each other, a layer's number less its place stays the same.
        for (setting, _), run in groupby(mine, lambda one: (one[1].setting, one[1].layer - one[0])):
            found.append((name, [point.layer for _, point in run], setting))
    return found
