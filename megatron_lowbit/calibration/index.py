"""The calibrated index: what is known of every sync point, in memory.

An index holds, per layer and sync point, the features that travel in BF16 for the codec that it
was calibrated for, and the statistics behind the choice. Since the statistics are there, one
calibration serves every codec: for another codec than the calibrated one, `select_bf16_index`
chooses that codec's default number of features by the same rule.

Layers are numbered as Megatron numbers them: from 1, over all pipeline stages.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit._moved import renamed
from megatron_lowbit.calibration.costs.stored import options_of
from megatron_lowbit.calibration.plan import Option, Options
from megatron_lowbit.calibration.recipe import Assignment, Key, Recipe
from megatron_lowbit.calibration.statistics import STATISTICS
from megatron_lowbit.codecs import Codec, Statistics, Tables
from megatron_lowbit.errors import IndexFileError, LowbitError
from megatron_lowbit.model.summing import Point

SUM_STATISTICS = tuple(f"sum_{name}" for name in STATISTICS)
# Energy of the means in units of the variances' that is believed. SmolLM2-135M, TP 3, has at most
# 28 at a sync point on Emma, and on "the the the" at least 980.
MOST_MEAN = 100.0


@dataclass(frozen=True)
class SyncPointRecord:
    """What calibration found at one sync point.

    Attributes:
        bf16_index: int32 ``[k]``, ascending: the features chosen for the manifest's codec.
        minimum: fp32 ``[ranks, hidden]``, moving average over sequences of each one's minimum.
        maximum: Likewise.
        mean: fp32 ``[ranks, hidden]``, over all tokens.
        second_moment: fp32 ``[ranks, hidden]``, mean of squares over all tokens.
        sum_minimum: fp32 ``[hidden]``, as `minimum`, of the sum over ranks.
        sum_maximum: Likewise.
        sum_mean: Likewise.
        sum_second_moment: Likewise.
        divergence: fp64 ``[options]``, nats that each of the manifest's options of a recipe is
            predicted to cost here; None without a recipe.
        divergence_carried: The same if errors are carried to the next sync point; None in an index
            that was calibrated before there was feedback.
        handed_on: What the next sync point would cost more if it missed all that it takes; None,
            and all that follows, in an index of before bits of sums were planned.
        missed: fp64 ``[options]``, the share of what it is given that each option misses.
        sum_divergence: As `divergence`, of the sum that two-shot quantizes again.
        sum_divergence_carried: Likewise.
        sum_handed_on: Likewise.
    """

    bf16_index: Tensor
    minimum: Tensor
    maximum: Tensor
    mean: Tensor
    second_moment: Tensor
    sum_minimum: Tensor
    sum_maximum: Tensor
    sum_mean: Tensor
    sum_second_moment: Tensor
    divergence: Tensor | None = None
    divergence_carried: Tensor | None = None
    handed_on: Tensor | None = None
    missed: Tensor | None = None
    sum_divergence: Tensor | None = None
    sum_divergence_carried: Tensor | None = None
    sum_handed_on: Tensor | None = None

    @property
    def ranges(self) -> Tensor:
        """fp32 ``[ranks, hidden]``: R = 2 max(|min|, |max|) (arXiv:2411.07942, section 3)."""
        return _ranges(self.minimum, self.maximum)

    def statistics(self, ranks: int) -> Statistics:
        """What codecs make tables of, for a group of `ranks`.

        Means add up over the parts of a rank, so they also serve a TP size that divides the
        calibrated one; for others they are left out. Variances and ranges are those of the
        calibrated TP size, whatever `ranks` is.
        """
        calibrated = len(self.mean)
        mean, variance = None, _variance(self.mean, self.second_moment)
        if calibrated % ranks == 0:
            mean = trusted(self.mean, variance)
            mean = mean.unflatten(0, (ranks, calibrated // ranks)).sum(dim=1)
        return Statistics(
            ranges=self.ranges,
            variance=variance,
            mean=mean,
            sum_ranges=_ranges(self.sum_minimum, self.sum_maximum),
            sum_variance=_variance(self.sum_mean, self.sum_second_moment),
        )


@dataclass(frozen=True)
class CalibrationIndex:
    """A whole index: `manifest` as in the file (`index_files`), and a record per sync point.

    Attributes:
        manifest: The JSON object of manifest.json.
        layers: layer number -> sync point name, such as ``mlp.linear_fc2`` -> record.
        origin: Where it was read from, for messages.
    """

    manifest: dict[str, Any]
    layers: dict[int, dict[str, SyncPointRecord]]
    origin: str = field(default="the calibration index", compare=False)

    @property
    def tp_size(self) -> int:
        """The tensor-parallel size it was calibrated at."""
        return self.manifest["tp_size"]

    @property
    def hidden(self) -> int:
        return self.manifest["model"]["hidden_size"]

    def record(self, layer: int, name: str) -> SyncPointRecord:
        """The record of a sync point, or an error that names it."""
        try:
            return self.layers[layer][name]
        except KeyError:
            raise IndexFileError(
                f"{self.origin} has no entry for layer {layer} {name}: "
                "calibrate this model with python -m megatron_lowbit calibrate"
            ) from None

    @property
    def recipe(self) -> Recipe | None:
        """What calibration planned for each sync point, if it did."""
        stored = self.manifest.get("recipe")
        if stored is None:
            return None
        return {
            (int(layer), name): Assignment.from_json(assignment)
            for layer, assignments in stored["points"].items()
            for name, assignment in assignments.items()
        }

    def options(self) -> dict[Key, list[Option]]:
        """What each sync point could get, at what cost: to plan for another budget.

        Raises:
            IndexFileError: The index has no recipe.
        """
        if self.manifest.get("recipe") is None:
            raise IndexFileError(
                f"{self.origin} has no recipe: make it with python -m megatron_lowbit calibrate "
                "--budget BITS"
            )
        assignments = [
            (Assignment.from_json(entry["choice"]), entry["bits_per_value"])
            for entry in self.manifest["recipe"]["options"]
        ]
        found: Options = {}
        for layer, records in self.layers.items():
            for name, record in records.items():
                found[layer, name] = options_of(assignments, vars(record))
        return found

    @property
    def has_feedback(self) -> bool:
        """Whether the recipe was planned for errors that are carried on."""
        return bool((self.manifest.get("recipe") or {}).get("feedback"))

    def bf16_index(
        self, layer: int, name: str, codec: Codec, bf16_features: int | None = None
    ) -> Tensor:
        """The features of a sync point that travel in BF16 with `codec`, ascending.

        `bf16_features` of them; if None, as many as the index or the codec says.
        """
        record = self.record(layer, name)
        if bf16_features is None:
            if codec.name == self.manifest["codec"]["name"]:
                return record.bf16_index
            bf16_features = codec.default_bf16_features(self.hidden)
        if not 0 <= bf16_features <= self.hidden:
            raise LowbitError(
                f"{bf16_features} BF16 features at layer {layer} {name}: there are {self.hidden}"
            )
        return select_bf16_index(record.ranges, bf16_features)

    def assigned(self, recipe: Recipe, point: Point) -> Assignment:
        """What a recipe has for a sync point.

        Raises:
            IndexFileError: It has nothing; the message names the sync point.
        """
        try:
            return recipe[point.layer, point.name]
        except KeyError:
            raise IndexFileError(
                f"{self.origin} has nothing for {point}: calibrate this model with "
                "python -m megatron_lowbit calibrate"
            ) from None

    def tables_at(self, point: Point, assignment: Assignment, ranks: int) -> Tables:
        """The tables of what is assigned to a sync point, where its partials are."""
        return self.tables(
            point.layer,
            point.name,
            assignment.make(),
            ranks=ranks,
            bf16_features=assignment.bf16_features,
            device=point.device,
        )

    def tables(
        self,
        layer: int,
        name: str,
        codec: Codec,
        *,
        ranks: int,
        bf16_features: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Tables:
        """The codec's tables of one sync point, for a group of `ranks`; see `bf16_index`."""
        return codec.tables(
            self.hidden,
            bf16_index=self.bf16_index(layer, name, codec, bf16_features),
            statistics=self.record(layer, name).statistics(ranks),
            device=device,
        )


def trusted(mean: Tensor, variance: Tensor) -> Tensor:
    """`mean`, or less of it where it rests on little.

    To subtract a mean saves its energy on texts that have it, and costs as much on those that do
    not. Where the means have far more energy than the variances the text had little variety: then
    less is subtracted, and nothing where nothing varied.

    Args:
        mean: fp32 ``[ranks, hidden]``.
        variance: Likewise.
    """
    ratio = mean_energy(mean, variance)
    return mean if ratio <= MOST_MEAN else mean * (MOST_MEAN / ratio)


def mean_energy(mean: Tensor, variance: Tensor) -> float:
    """The energy of all means in units of the variances'."""
    energy, spread = mean.double().square().sum().item(), variance.double().sum().item()
    return energy / spread if spread > 0 else math.inf if energy > 0 else 0.0


def collapsed(index: CalibrationIndex) -> tuple[int, int]:
    """At how many sync points the means are not believed (`trusted`), and how many there are."""
    records = [record for of_layer in index.layers.values() for record in of_layer.values()]
    ratios = [
        mean_energy(record.mean, _variance(record.mean, record.second_moment)) for record in records
    ]
    return sum(ratio > MOST_MEAN for ratio in ratios), len(records)


def _ranges(minimum: Tensor, maximum: Tensor) -> Tensor:
    return 2 * torch.maximum(minimum.abs(), maximum.abs())


def _variance(mean: Tensor, second_moment: Tensor) -> Tensor:
    return (second_moment - mean.square()).clamp_min(0)


def select_bf16_index(ranges: Tensor, count: int) -> Tensor:
    """The `count` features with the largest range, summed over ranks (the paper's rule).

    Args:
        ranges: ``[ranks, hidden]``.
        count: How many, 0 to hidden.

    Returns:
        int32 ``[count]``, ascending. Of features with equal ranges the first are taken.
    """
    summed = ranges.double().sum(dim=0)
    chosen = torch.argsort(summed, descending=True, stable=True)[:count]
    return chosen.sort().values.to(torch.int32)


__getattr__ = renamed(__name__)
