"""The recipe of an index: how many bits and BF16 features each sync point has."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.report.results import first_problem


class _Entry(BaseModel):
    codec: str
    bits: int
    bf16_features: int


class _Recipe(BaseModel):
    """As it stands in the manifest: layer -> sync point -> entry."""

    points: dict[int, dict[str, _Entry]]


@dataclass(frozen=True)
class RecipePoint:
    """What one sync point travels in."""

    layer: int
    name: str
    codec: str
    bits: int
    bf16_features: int

    @property
    def setting(self) -> tuple[str, int, int]:
        """All that the recipe says of it."""
        return self.codec, self.bits, self.bf16_features


@dataclass(frozen=True)
class Run:
    """Layers that follow each other, in which one kind of sync point has one setting."""

    name: str
    first: int
    last: int
    setting: tuple[str, int, int]


def read_recipe(manifest: dict[str, Any]) -> list[RecipePoint]:
    """The recipe of a manifest, by layer; empty where it has none.

    Raises:
        LowbitError: It has one that cannot be read; the message names the key.
    """
    if manifest.get("recipe") is None:
        return []
    try:
        recipe = _Recipe.model_validate(manifest["recipe"])
    except ValidationError as error:
        raise LowbitError(f"the index's manifest: recipe.{first_problem(error)}") from None
    points = [
        RecipePoint(layer, name, entry.codec, entry.bits, entry.bf16_features)
        for layer, of_layer in recipe.points.items()
        for name, entry in of_layer.items()
    ]
    return sorted(points, key=lambda point: (point.layer, point.name))


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
