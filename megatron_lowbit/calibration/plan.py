"""Planning a recipe: where to spend a budget of bits.

The divergence that quantization brings into a model is close to a sum over its sync points, so bits
are best spent where they buy most of it. From the divergence that each option would cost at each
sync point (`calibration.sensitivity` measures it) `plan` finds the option that costs least within
an average number of bits.
"""

import heapq
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from megatron_lowbit.calibration.recipe import Assignment, Key, Recipe
from megatron_lowbit.codecs import CALIBRATED_CODEC, Statistics, get_codec
from megatron_lowbit.errors import LowbitError


@dataclass(frozen=True)
class Option:
    """An assignment that a plan can make at a sync point.

    Attributes:
        assignment: What it assigns.
        bits_per_value: What it takes on the wire, all included.
        divergence: Nats that it costs there, predicted.
        carried: The same if errors are carried to the next sync point (`codecs.carry`); None in an
            index that was calibrated before there was feedback.
    """

    assignment: Assignment
    bits_per_value: float
    divergence: float
    carried: float | None = None


Options = dict[Key, list[Option]]


def with_feedback(options: Options) -> Options:
    """The options at the divergence that they cost with error feedback.

    Raises:
        LowbitError: They were measured before there was feedback.
    """
    return {key: [_carried(option) for option in of_point] for key, of_point in options.items()}


def _carried(option: Option) -> Option:
    if option.carried is None:
        raise LowbitError(
            "this recipe was planned without error feedback: plan it anew with "
            "python -m megatron_lowbit calibrate --budget BITS"
        )
    return replace(option, divergence=option.carried)


# Nothing is sent: the calibrated mean is the sum, and the next sync point sends the rest.
SKIP = Assignment(CALIBRATED_CODEC, 0, 0)


def candidates(hidden: int) -> list[Assignment]:
    """What a sync point can get: nothing, bits by BF16 features, or all of it in BF16."""
    bits = sorted(get_codec(CALIBRATED_CODEC).supported_bits)
    features = sorted({0, hidden // 256, hidden // 128, hidden // 64, hidden // 32})
    low = [Assignment(CALIBRATED_CODEC, b, k) for b in bits for k in features]
    return [SKIP, *low, Assignment("bf16", 16)]


def bits_per_value(assignment: Assignment, hidden: int) -> float:
    """What a candidate takes on the wire at this hidden size, all included."""
    codec, kept = assignment.make(), torch.arange(assignment.bf16_features or 0)
    statistics = Statistics(variance=torch.ones(1, hidden))
    tables = codec.tables(hidden, bf16_index=kept, statistics=statistics)
    return 8 * codec.row_bytes(tables) / hidden


def plan(options: Options, budget: float, *, skipped: Collection[Key] = ()) -> Recipe:
    """The least divergence within an average number of bits.

    Each sync point starts with its cheapest option; then, over and over, the step that saves most
    divergence for its bits is taken, among steps along each sync point's convex hull. That is the
    optimum of the relaxed problem (Shoham and Gersho, IEEE Trans. ASSP 36, 1988) but for the last
    step, which may not fit and is left for smaller ones.

    Args:
        options: Of each sync point, all of them.
        budget: Average of `Option.bits_per_value` over the sync points.
        skipped: Those that send nothing.

    Raises:
        LowbitError: `budget` is below the cheapest options.
    """
    hulls = {
        key: _hull([o for o in of_point if (o.assignment == SKIP) == (key in skipped)])
        for key, of_point in options.items()
    }
    left = (budget + 1e-9) * len(hulls) - sum(hull[0].bits_per_value for hull in hulls.values())
    if left < 0:
        least = sum(hull[0].bits_per_value for hull in hulls.values()) / len(hulls)
        raise LowbitError(
            f"a budget of {budget:g} bits a value is below what the codecs can do here: "
            f"ask for {least:.2f} or more"
        )
    taken = {key: 0 for key in hulls}
    steps = [_step(hull, 0, key) for key, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, key, bits = heapq.heappop(steps)
        if bits > left:
            continue
        left -= bits
        taken[key] += 1
        if taken[key] + 1 < len(hulls[key]):
            heapq.heappush(steps, _step(hulls[key], taken[key], key))
    return {key: hulls[key][at].assignment for key, at in taken.items()}


def average_bits(options: Options, recipe: Recipe) -> float:
    """Bits a value of a planned recipe, over its sync points."""
    return _total(options, recipe, "bits_per_value") / len(recipe)


def predicted_divergence(options: Options, recipe: Recipe) -> float:
    """Nats a token that a planned recipe is predicted to cost."""
    return _total(options, recipe, "divergence")


def _hull(options: list[Option]) -> list[Option]:
    """The options on the lower convex hull of divergence over bits, fewest bits first."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bits_per_value, o.divergence)):
        if hull and option.divergence >= hull[-1].divergence:
            continue
        while len(hull) > 1 and _slope(hull[-1], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(first: Option, second: Option) -> float:
    bits = second.bits_per_value - first.bits_per_value
    return (second.divergence - first.divergence) / bits if bits else float("-inf")


def _step(hull: list[Option], at: int, key: Key) -> tuple[float, Key, float]:
    """The step from hull[at] to the next: for a heap that gives the steepest first."""
    first, second = hull[at : at + 2]
    return _slope(first, second), key, second.bits_per_value - first.bits_per_value


def _total(options: Options, recipe: Recipe, attribute: str) -> float:
    total = 0.0
    for key, assignment in recipe.items():
        option = next(option for option in options[key] if option.assignment == assignment)
        total += getattr(option, attribute)
    return total
