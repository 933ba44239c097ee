"""Variants by their names in the results, on the sync points of a model.

What a name can say is on the page (megatron_lowbit/evaluation/README.md, "Variants").
"""

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial as bind

import torch
from torch import Tensor

from megatron_lowbit.calibration.costs.neighbours import following_keys
from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.calibration.plan import (
    SKIP,
    average_bits,
    least_bits,
    plan,
    with_feedback,
)
from megatron_lowbit.calibration.recipe import Recipe, with_strong_ends
from megatron_lowbit.codecs import Codec, Tables, parse_codec
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.evaluation_loop import Variant
from megatron_lowbit.evaluation.measures.sync_error import Observer
from megatron_lowbit.model.summing import CountingReducer, Folded, Placed, Point, Summing

_TWO_SHOT, _FOLDED, _FEEDBACK = "two-shot", "folded", "feedback"
_COMPARED = ("bf16", "int4", "int4-random", "static-hybrid", "rotated-hybrid", "shaped-hybrid")


@dataclass(frozen=True)
class Named:
    """What a variant's name means.

    Attributes:
        base: The name without its collective.
        collective: ``one-shot`` or ``two-shot``.
        codec: The codec at every sync point; None for a recipe.
        budget: Bits a value of a recipe planned anew; None for another variant or the index's own.
        is_folded: Whether the weights take the rotation.
        has_feedback: Whether errors are carried from sync point to sync point.
    """

    base: str
    collective: str
    codec: Codec | None = None
    budget: float | None = None
    is_folded: bool = False
    has_feedback: bool = False

    def codecs(self, index: CalibrationIndex) -> list[Codec]:
        """The codecs that it uses, for checks."""
        if self.codec is not None:
            return [self.codec]
        options = index.options().values()  # raises where there is no recipe
        choices = {option.assignment for of_point in options for option in of_point}
        return [choice.make() for choice in {*choices, *(index.recipe or {}).values()}]

    def prepare(self, index: CalibrationIndex, summing: Summing) -> list[tuple]:
        """The codec of each sync point of this stage, and its tables."""
        recipe: Recipe = {}
        if self.codec is None:
            recipe = self._recipe(index, summing.everywhere)
            if self.has_feedback and summing.stages.count > 1:  # as serving does at a stage's end
                recipe = with_strong_ends(recipe, summing.points)
        return [self._at(index, point, summing.ranks, recipe) for point in summing.points]

    def _at(
        self, index: CalibrationIndex, point: Point, ranks: int, recipe: Recipe
    ) -> tuple[Codec, Tables]:
        if self.codec is None:
            assignment = index.assigned(recipe, point)
            return assignment.make(), index.tables_at(point, assignment, ranks)
        codec = self.codec
        if self.base in _BASELINES:
            return codec, _with_features(_BASELINES[self.base], codec, index, point, ranks)
        return codec, index.tables(point.layer, point.name, codec, ranks=ranks, device=point.device)

    def _recipe(self, index: CalibrationIndex, points: Sequence[Placed]) -> Recipe:
        options, own = index.options(), index.recipe  # raises where there is no recipe
        assert own is not None
        if self.budget is None and (self.has_feedback or not index.has_feedback):
            return own
        skipped = {key for key, assignment in own.items() if assignment == SKIP}
        budget = average_bits(options, own) if self.budget is None else self.budget
        if self.has_feedback:
            costs, following = with_feedback(options), following_keys(points)
            return plan(costs, budget, skipped=skipped, following=following)
        if self.budget is None and skipped:  # which only feedback makes good
            budget = max(budget, least_bits(options))
        return plan(options, budget)


def parse_variant(name: str) -> Named:
    """What a variant's name means.

    Raises:
        LowbitError: Unknown codec, number of bits or way.
    """
    base, *ways = name.split("@")
    for way in ways:
        if way not in (_TWO_SHOT, _FOLDED, _FEEDBACK):
            known = f"@{_TWO_SHOT}, @{_FEEDBACK} or @{_FOLDED}"
            raise LowbitError(f"{name}: @{way} is not {known}")
    if _FOLDED in ways and _FEEDBACK in ways:
        raise LowbitError(f"{name}: a folded weight's error is rotated and cannot be carried on")
    collective = "two-shot" if _TWO_SHOT in ways or "+" in base else "one-shot"
    recipe = re.fullmatch(r"recipe(?:-(\d+(?:\.\d+)?))?", base)
    if recipe:
        codec, budget = None, float(recipe[1]) if recipe[1] else None
    else:
        budget, codec = None, parse_codec("static-hybrid" if base in _BASELINES else base)
    return Named(base, collective, codec, budget, _FOLDED in ways, _FEEDBACK in ways)


def default_variants(index: CalibrationIndex) -> list[str]:
    """What is compared if nobody says: codecs, and what is served by `index` in three ways.

    Its recipe, or the codec that it is for: without feedback, as it is served, and so in two-shot.
    """
    own = index.manifest["codec"]["name"] if index.recipe is None else "recipe"
    carries = index.recipe is not None or parse_codec(own).carries
    served = f"{own}@{_FEEDBACK}" if carries else own
    return list(dict.fromkeys([*_COMPARED, own, served, f"{served}@{_TWO_SHOT}"]))


class Variants:
    """The variants of one evaluation.

    Attributes:
        summing: How the model sums its partials.
        reducers: Variant -> a reducer for each sync point.
    """

    def __init__(self, chosen: dict[str, Named], summing: Summing, index: CalibrationIndex):
        self.summing = summing
        self.reducers: dict[str, list[CountingReducer]] = {}
        self._foldings: dict[str, Folded] = {}
        for name, named in chosen.items():
            prepared = named.prepare(index, summing)
            codecs = [codec for codec, _ in prepared]
            tables = [table for _, table in prepared]
            if named.is_folded:
                self._foldings[name] = summing.folded(tables)
                tables = self._foldings[name].tables
            self.reducers[name] = summing.reducers(
                codecs, tables, named.collective, feedback=named.has_feedback
            )

    def all(self) -> list[Variant]:
        """As the evaluation loop takes them."""
        return [
            Variant(name, bind(self._using, name), [reducer.traffic for reducer in reducers])
            for name, reducers in self.reducers.items()
        ]

    @contextmanager
    def _using(self, name: str) -> Iterator[None]:
        folding = self._foldings.get(name, nullcontext())
        with folding, self.summing.using(self.reducers[name]):
            yield

    def observing(self, observe: Observer) -> AbstractContextManager:
        """A context in which each sync point sums by all variants, too, for `SyncError`.

        But for those with folded weights: they have no native partials.
        """

        def watch(number: int, partial: Tensor, native: Tensor) -> None:
            exact = self.summing.exact(self.summing.points[number], partial)
            sums = {  # reducers may sum in place
                name: reducers[number](partial.clone(), False)
                for name, reducers in self.reducers.items()
                if name not in self._foldings
            }
            observe(number, exact, sums)

        return self.summing.watching(watch)


def _with_features(
    choose, codec: Codec, index: CalibrationIndex, point: Point, ranks: int
) -> Tables:
    """Of `codec` with the calibrated statistics and another BF16 index."""
    count = len(index.bf16_index(point.layer, point.name, codec))
    features = torch.tensor(choose(index, point, count), dtype=torch.int64)
    statistics = index.record(point.layer, point.name).statistics(ranks)
    tables = codec.tables(index.hidden, bf16_index=features, statistics=statistics)
    return tables.to(point.device)


def _random_features(index: CalibrationIndex, point: Point, count: int) -> list[int]:
    """The same on every rank and in every run, another choice for each sync point."""
    return random.Random(str(point)).sample(range(index.hidden), count)


_BASELINES = {"int4": lambda index, point, count: [], "int4-random": _random_features}
