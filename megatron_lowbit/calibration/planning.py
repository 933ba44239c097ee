"""Recipes for a checkpoint: what tools/calibrate.py --budget and --target-loss do.

`Planner.for_budget` plans by predicted divergence. `Planner.for_target` looks for the fewest bits
whose divergence, measured on calibration sequences, stays within a target: by bisection over
budgets, each with its own plan. What is measured is the KL divergence from native communication,
since the difference in loss of so few tokens is mostly noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lowbit import cli
from megatron_lowbit.calibration.costs.neighbours import following_keys
from megatron_lowbit.calibration.costs.option_costs import measure_options
from megatron_lowbit.calibration.costs.stored import stored
from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.calibration.plan import (
    SKIP,
    Following,
    Options,
    average_bits,
    average_sum_bits,
    plan,
    predicted_divergence,
    with_feedback,
)
from megatron_lowbit.calibration.recipe import Key, Recipe, with_strong_ends
from megatron_lowbit.calibration.skipping import choose_skipped
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.model import logits as lm
from megatron_lowbit.model.language_model import LanguageModel
from megatron_lowbit.model.summing import Placed, Summing

_PLANNING_TOKENS = 4096  # of the first calibration sequences
_RESOLUTION = 0.05  # bits a value


@dataclass(frozen=True)
class Planner:
    """What planning works with.

    Attributes:
        index: Calibrated statistics.
        model: How to run the model.
        summing: How it sums.
        sequences: int64 ``[n, seq_length]`` to plan on.
        options: Of every sync point.
        dp_group: The ranks that share the sequences.
        feedback: Whether errors will be carried from sync point to sync point.
        skipped: The sync points that are to send nothing.
    """

    index: CalibrationIndex
    model: LanguageModel
    summing: Summing
    sequences: Tensor
    options: Options
    dp_group: dist.ProcessGroup | None
    feedback: bool = False
    skipped: frozenset[Key] = frozenset()

    def for_budget(self, budget: float) -> Recipe:
        """The recipe of least predicted divergence within `budget` bits a value."""
        return plan(self.options, budget, following=self.following, skipped=self.skipped)

    @property
    def following(self) -> Following:
        """Which sync point takes whose errors."""
        return following_keys(self.summing.everywhere) if self.feedback else {}

    def for_target(self, target: float) -> tuple[Recipe, float]:
        """The recipe of fewest bits within `target` nats of measured divergence, and the nats.

        Raises:
            LowbitError: Even the best recipe is beyond `target`.
        """
        least, most = (
            sum(edge(self._bits(key)) for key in self.options) / len(self.options)
            for edge in (min, max)
        )
        best = self.for_budget(most)
        nats = self.measure(best)
        if not nats <= target:
            raise LowbitError(
                f"--target-loss {target:g}: even BF16 at every sync point is {nats:.4f} nats from "
                "native communication here: ask for more"
            )
        while most - least > _RESOLUTION:
            middle = (least + most) / 2
            recipe = self.for_budget(middle)
            measured = self.measure(recipe)
            cli.say(f"{average_bits(self.options, recipe):.2f} bits a value: {measured:.4f} nats")
            if measured <= target:
                best, nats, most = recipe, measured, middle
            else:
                least = middle
        return best, nats

    def _bits(self, key: Key) -> list[float]:
        """What a sync point may take."""
        if key in self.skipped:
            return [0.0]
        return [o.bits_per_value for o in self.options[key] if o.assignment != SKIP]

    def measure(self, recipe: Recipe) -> float:
        """The KL divergence of a recipe from native communication, nats a token; on every rank."""
        reducers, group = self._reducers(recipe), self.model.tp_group
        sums = torch.zeros(2, dtype=torch.float64)
        rank, ranks = dist.get_rank(self.dp_group), dist.get_world_size(self.dp_group)
        for sequence in self.sequences[rank::ranks]:
            native = self._log_probs(sequence)
            with self.summing.using(reducers):
                low = self._log_probs(sequence)
            nats = lm.kl_divergence(native, low, group=group).double().sum().item()
            sums += torch.tensor([nats, len(sequence)], dtype=torch.float64)
        sums = sums.to(self.summing.points[0].device)
        dist.all_reduce(sums, group=self.dp_group)
        dist.broadcast(sums, src=0)
        return (sums[0] / sums[1]).item()

    def _log_probs(self, sequence: Tensor) -> Tensor:
        logits = self.model.logits(sequence[None])[0]
        return lm.log_softmax(logits, vocab_size=self.model.vocab_size, group=self.model.tp_group)

    def _reducers(self, recipe: Recipe) -> list:
        codecs, tables = [], []
        if self.feedback and self.summing.stages.count > 1:  # as serving does at a stage's end
            recipe = with_strong_ends(recipe, self.summing.points)
        for point in self.summing.points:
            assignment = recipe[point.layer, point.name]
            tables.append(self.index.tables_at(point, assignment, self.summing.ranks))
            codecs.append(assignment.make())
        return self.summing.reducers(codecs, tables, "one-shot", feedback=self.feedback)


def with_recipe(
    index: CalibrationIndex,
    module: nn.Module,
    model: LanguageModel,
    summing: Summing,
    sequences: Tensor,
    *,
    budget: float | None,
    target: float | None,
    dp_group: dist.ProcessGroup | None,
    feedback: bool = True,
    skip: int = 0,
) -> CalibrationIndex:
    """`index` with a recipe within `budget` bits a value or `target` nats; call it on every rank.

    Args:
        index: Calibrated statistics.
        module: The model itself, for gradients.
        model: How to run it.
        summing: How it sums.
        sequences: int64 ``[n, seq_length]``, the same on every rank; the first of them are used.
        budget: Average bits a value, all included; or None.
        target: Nats of divergence; or None.
        dp_group: The ranks that share the sequences.
        feedback: Whether errors will be carried from sync point to sync point.
        skip: How many sync points are to send nothing; with feedback only.

    Raises:
        LowbitError: The budget or the target is out of reach, or so many cannot be skipped.
    """
    sequences = sequences[: max(1, _PLANNING_TOKENS // sequences.shape[1])]
    options = measure_options(
        module,
        summing,
        index,
        sequences,
        vocab_size=model.vocab_size,
        dp_group=dp_group,
        track=cli.progress,
    )
    costs = with_feedback(options) if feedback else options
    skipped = choose_skipped(costs, summing.everywhere, skip)
    planner = Planner(index, model, summing, sequences, costs, dp_group, feedback, skipped)
    if budget is not None:
        recipe, goal = planner.for_budget(budget), {"budget": budget}
    else:
        assert target is not None, "one of both is asked for"
        recipe, nats = planner.for_target(target)
        goal = {"target_loss": target, "measured_divergence": nats}
    return _add(index, recipe, options, goal, planner)


def _add(
    index: CalibrationIndex, recipe: Recipe, options: Options, goal: dict, planner: Planner
) -> CalibrationIndex:
    """`index` with a recipe and, to plan others, with what all options cost."""
    first = next(iter(options.values()))
    of_plan = planner.options, recipe, planner.following
    entry = {
        **goal,
        "feedback": planner.feedback,
        "bits_per_value": average_bits(options, recipe),
        "sum_bits_per_value": average_sum_bits(options, recipe),
        "predicted_divergence": predicted_divergence(*of_plan),
        "predicted_two_shot": predicted_divergence(*of_plan, two_shot=True),
        "points": _points(recipe),
        "options": [
            {"choice": o.assignment.to_json(), "bits_per_value": o.bits_per_value} for o in first
        ],
    }
    layers = {
        layer: {
            name: replace(record, **stored(options[layer, name]))
            for name, record in records.items()
        }
        for layer, records in index.layers.items()
    }
    return replace(index, manifest={**index.manifest, "recipe": entry}, layers=layers)


def replanned(
    index: CalibrationIndex, points: Sequence[Placed], budget: float, *, skip: int = 0
) -> CalibrationIndex:
    """`index` with a recipe anew, planned for feedback from the costs that it holds.

    Args:
        index: With a recipe.
        points: The sync points, in call order.
        budget: Average bits a value, all included.
        skip: How many sync points are to send nothing.

    Raises:
        LowbitError: There is no recipe, or the budget or so many skipped ones are out of reach.
    """
    options = with_feedback(index.options())
    skipped = choose_skipped(options, points, skip)
    recipe = plan(options, budget, following=following_keys(points), skipped=skipped)
    entry = {**index.manifest["recipe"], "feedback": True, "points": _points(recipe)}
    return replace(index, manifest={**index.manifest, "recipe": entry})


def _points(recipe: Recipe) -> dict[str, dict]:
    """A recipe as the manifest has it: layer -> sync point -> what is assigned."""
    points: dict[str, dict] = {}
    for (layer, name), assignment in recipe.items():
        points.setdefault(str(layer), {})[name] = assignment.to_json()
    return points
