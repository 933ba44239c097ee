"""What the index says of each sync point: how wide its features are, and its recipe.

The range of a feature is the one that chooses the BF16 features: R = 2 max(|min|, |max|) per rank,
summed over the ranks (arXiv:2411.07942, section 3). A recipe gives each sync point its codec, bits
and number of BF16 features.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from megatron_lowbit.calibration.validation.index_schema import Assigned
from megatron_lowbit.schema import LayerKey, Name, Strict, validated


class _Placed(Protocol):
    """Whatever has a layer and a name."""

    @property
    def layer(self) -> int: ...

    @property
    def name(self) -> str: ...


Point = TypeVar("Point", bound=_Placed)
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


class _Recipe(Strict):
    points: dict[LayerKey, dict[Name, Assigned]]


class _Manifest(Strict):
    recipe: _Recipe | None = None


@dataclass(frozen=True)
class RecipePoint:
    """What one sync point travels in; None is what the codec leaves no choice about.

    Attributes:
        layer: From 1, over all pipeline stages.
        name: Such as ``mlp.linear_fc2``.
        codec: By its name.
        bits: Of partials.
        bf16_features: How many.
        sum_bits: Of sums, if they have others.
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


@dataclass(frozen=True)
class Run:
    """Layers that follow each other, in which one kind of sync point has one setting."""

    name: str
    first: int
    last: int
    setting: Setting


def read_recipe(manifest: dict[str, Any]) -> list[RecipePoint]:
    """The recipe of a manifest, by layer; empty where it has none.

    Raises:
        LowbitError: It has one that cannot be read; the message names the key.
    """
    recipe = validated(_Manifest, manifest, "the calibration index's manifest").recipe
    if recipe is None:
        return []
    points = [
        _point(int(layer), name, entry)
        for layer, of_layer in recipe.points.items()
        for name, entry in of_layer.items()
    ]
    return sorted(points, key=lambda point: (point.layer, point.name))


def _point(layer: int, name: str, entry: Assigned) -> RecipePoint:
    bits, of_sums = entry.bits if isinstance(entry.bits, list) else (entry.bits, None)
    return RecipePoint(layer, name, entry.codec, bits, entry.bf16_features, of_sums)


def runs(points: list[RecipePoint]) -> list[Run]:
    """The recipe in as few lines as it takes."""
    found: list[Run] = []
    for name in dict.fromkeys(point.name for point in points):
        for point in (point for point in points if point.name == name):
            last = found[-1] if found else None
            if last and (last.name, last.last, last.setting) == (
                name, point.layer - 1, point.setting,
            ):  # fmt: skip
                found[-1] = Run(name, last.first, point.layer, point.setting)
            else:
                found.append(Run(name, point.layer, point.layer, point.setting))
    return found
