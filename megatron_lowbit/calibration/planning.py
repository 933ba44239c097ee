"""Recipes for a checkpoint: what tools/calibrate.py --budget and --target-loss do.

`Planner.for_budget` plans by predicted divergence. `Planner.for_target` looks for the fewest bits
whose divergence, measured on calibration sequences, stays within a target: by bisection over
budgets, each with its own plan. What is measured is the KL divergence from native communication,
since the difference in loss of so few tokens is mostly noise.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lowbit import cli
from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.calibration.plan import Option, average_bits, plan, predicted_divergence
from megatron_lowbit.calibration.recipe import Key, Recipe
from megatron_lowbit.calibration.sensitivity import measure_options
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.model import logits as lm
from megatron_lowbit.model.language_model import LanguageModel
from megatron_lowbit.model.summing import Summing

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
    """

    index: CalibrationIndex
    model: LanguageModel
    summing: Summing
    sequences: Tensor
    options: dict[Key, list[Option]]
    dp_group: dist.ProcessGroup | None

    def for_budget(self, budget: float) -> Recipe:
        """The recipe of least predicted divergence within `budget` bits a value."""
        return plan(self.options, budget)

    def for_target(self, target: float) -> tuple[Recipe, float]:
        """The recipe of fewest bits within `target` nats of measured divergence, and the nats.

        Raises:
            LowbitError: Even the best recipe is beyond `target`.
        """
        least, most = (
            sum(edge(o.bits_per_value for o in options) for options in self.options.values())
            / len(self.options)
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
        reducers = []
        for point in self.summing.points:
            assignment = recipe[point.layer, point.name]
            tables = self.index.tables_at(point, assignment, self.summing.ranks)
            reducers.append(self.summing.reducer(point, assignment.make(), tables, "one-shot"))
        return reducers


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

    Raises:
        LowbitError: The budget or the target is out of reach.
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
    planner = Planner(index, model, summing, sequences, options, dp_group)
    if budget is not None:
        recipe, goal = planner.for_budget(budget), {"budget": budget}
    else:
        assert target is not None, "one of both is asked for"
        recipe, nats = planner.for_target(target)
        goal = {"target_loss": target, "measured_divergence": nats}
    return _add(index, recipe, options, goal)


def _add(
    index: CalibrationIndex, recipe: Recipe, options: dict[Key, list[Option]], goal: dict
) -> CalibrationIndex:
    points: dict[str, dict] = {}
    for (layer, name), assignment in recipe.items():
        points.setdefault(str(layer), {})[name] = assignment.to_json()
    first = next(iter(options.values()))
    entry = {
        **goal,
        "bits_per_value": average_bits(options, recipe),
        "predicted_divergence": predicted_divergence(options, recipe),
        "points": points,
        "options": [
            {"choice": o.assignment.to_json(), "bits_per_value": o.bits_per_value} for o in first
        ],
    }
    layers = {
        layer: {
            name: replace(record, divergence=_divergence(options[layer, name]))
            for name, record in records.items()
        }
        for layer, records in index.layers.items()
    }
    return replace(index, manifest={**index.manifest, "recipe": entry}, layers=layers)


def _divergence(options: list[Option]) -> Tensor:
    return torch.tensor([option.divergence for option in options], dtype=torch.float64)
