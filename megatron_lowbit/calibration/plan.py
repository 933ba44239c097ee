"""Planning a recipe: where to spend a budget of bits.

The divergence that quantization brings into a model is close to a sum over its sync points, so bits
are best spent where they buy most of it. From the divergence that each option would cost at each
sync point (`calibration.costs` measures it) `plan` finds the options that cost least within an
average number of bits. With error feedback neighbours interact (`calibration.allocation`).

Two-shot quantizes the sum once more, and the bits of sums are planned, too: after those of the
partials, with the BF16 features that these have, and within the same average. So one-shot gets the
best plan there is for it, and both collectives keep the budget: bits of partials are within it on
average, and bits of sums are.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from megatron_lowbit.calibration.allocation import Terms, spend
from megatron_lowbit.calibration.recipe import Assignment, Key, Recipe
from megatron_lowbit.codecs import CALIBRATED_CODEC, Statistics, get_codec
from megatron_lowbit.errors import LowbitError

# An option that misses nearly all does not blow up what it hands on without limit.
_MOST_MISSED = 0.9


@dataclass(frozen=True)
class Cost:
    """What one quantization costs, in nats a token, as predicted.

    Attributes:
        divergence: By its error where it is made.
        carried: The same if the next sync point repairs it (`codecs.carry`); None in an index that
            was calibrated before there was feedback.
        handed_on: What the next sync point would cost more if it missed all that it takes.
    """

    divergence: float
    carried: float | None = None
    handed_on: float = 0.0


@dataclass(frozen=True)
class Option:
    """An assignment that a plan can make at a sync point.

    Attributes:
        assignment: What it assigns, to partials and to sums alike.
        bits_per_value: What it takes on the wire, all included.
        cost: Of the partials.
        missed: The share of what it is given that it misses.
        of_sum: Of the sum that is quantized again; None in an index of before.
    """

    assignment: Assignment
    bits_per_value: float
    cost: Cost
    missed: float = 0.0
    of_sum: Cost | None = None

    @property
    def divergence(self) -> float:
        """Of the partials."""
        return self.cost.divergence


Options = dict[Key, list[Option]]
Following = Mapping[Key, Key]  # a sync point -> the one that takes its error


def with_feedback(options: Options) -> Options:
    """The options at the divergence that they cost with error feedback.

    Raises:
        LowbitError: They were measured before there was feedback.
    """
    return {
        key: [
            replace(o, cost=_carried(o.cost), of_sum=o.of_sum and _carried(o.of_sum))
            for o in of_point
        ]
        for key, of_point in options.items()
    }


def _carried(cost: Cost) -> Cost:
    if cost.carried is None:
        raise LowbitError(
            "this recipe was planned without error feedback: plan it anew with "
            "python -m megatron_lowbit calibrate --budget BITS"
        )
    return replace(cost, divergence=cost.carried)


# Nothing is sent: the calibrated mean is the sum, and the next sync point sends the rest.
SKIP = Assignment(CALIBRATED_CODEC, 0, 0)


def candidates(hidden: int) -> list[Assignment]:
    """What a sync point can get: nothing, bits by BF16 features, or all of it in BF16."""
    bits = sorted(get_codec(CALIBRATED_CODEC).supported_bits)
    features = sorted({0, hidden // 128, hidden // 32})
    low = [Assignment(CALIBRATED_CODEC, b, k) for b in bits for k in features]
    return [SKIP, *low, Assignment("bf16", 16)]


def bits_per_value(assignment: Assignment, hidden: int) -> float:
    """What a candidate takes on the wire at this hidden size, all included."""
    codec, kept = assignment.make(), torch.arange(assignment.bf16_features or 0)
    statistics = Statistics(variance=torch.ones(1, hidden))
    tables = codec.tables(hidden, bf16_index=kept, statistics=statistics)
    return 8 * codec.row_bytes(tables) / hidden


def plan(
    options: Options,
    budget: float,
    *,
    following: Following | None = None,
    skipped: Collection[Key] = (),
) -> Recipe:
    """The least divergence within an average number of bits, of partials and of sums.

    Args:
        options: Of each sync point, all of them.
        budget: Average of `Option.bits_per_value` over the sync points.
        following: Which sync point takes whose errors; none without error feedback.
        skipped: Those that send nothing.

    Raises:
        LowbitError: `budget` is below the cheapest options.
    """
    order, terms = _terms(options, following, skipped)
    least = least_bits(options, skipped=skipped)
    if least > budget + 1e-9:
        raise LowbitError(
            f"a budget of {budget:g} bits a value is below what the codecs can do here: "
            f"ask for {least:.2f} or more"
        )
    chosen = spend(terms, budget)
    recipe = {key: options[key][at].assignment for key, at in zip(order, chosen, strict=True)}
    if all(option.of_sum for of_point in options.values() for option in of_point):
        sums = spend(_terms_of_sums(options, following, order, recipe)[1], budget)
        for key, at in zip(order, sums, strict=True):
            recipe[key] = _with_sum_bits(recipe[key], options[key][at].assignment)
    return {key: recipe[key] for key in options}


def average_bits(options: Options, recipe: Recipe) -> float:
    """Bits a value of a planned recipe's partials, over its sync points."""
    return _average([_option(options, recipe, key) for key in recipe])


def least_bits(options: Options, *, skipped: Collection[Key] = ()) -> float:
    """The fewest bits a value on average, where only the `skipped` ones send nothing."""
    least = []
    for key, of_point in options.items():
        allowed = (o for o in of_point if (o.assignment == SKIP) == (key in skipped))
        least.append(min((o.bits_per_value for o in allowed), default=math.inf))
    return sum(least) / len(least)


def average_sum_bits(options: Options, recipe: Recipe) -> float:
    """Bits a value of a planned recipe's sums, over its sync points."""
    return _average([_option(options, recipe, key, sums=True) for key in recipe])


def predicted_divergence(
    options: Options, recipe: Recipe, following: Following | None = None, *, two_shot: bool = False
) -> float:
    """Nats a token that a planned recipe is predicted to cost.

    Args:
        options: Those that it was planned from.
        recipe: Of all their sync points.
        following: As for `plan`.
        two_shot: Whether sums are quantized, too; the options must know what that costs.
    """
    order, terms = _terms(options, following)
    nats = terms.total([options[key].index(_option(options, recipe, key)) for key in order])
    if two_shot:
        _, terms = _terms_of_sums(options, following, order, recipe)
        chosen = [options[key].index(_option(options, recipe, key, sums=True)) for key in order]
        nats += terms.total(chosen)
    return nats


def _terms(
    options: Options, following: Following | None, skipped: Collection[Key] | None = None
) -> tuple[list[Key], Terms]:
    """The sync points, chain after chain, and what partials cost there."""
    order, takes = _in_order(options, following or {})
    allowed = {
        key: [skipped is None or (o.assignment == SKIP) == (key in skipped) for o in of_point]
        for key, of_point in options.items()
    }
    costs = {key: [option.cost for option in of_point] for key, of_point in options.items()}
    return order, _made(options, costs, allowed, order, takes)


def _terms_of_sums(
    options: Options, following: Following | None, order: list[Key], recipe: Recipe
) -> tuple[list[Key], Terms]:
    """The same of sums, which have the codec and the BF16 features of the partials."""
    _, takes = _in_order(options, following or {})
    allowed = {
        key: [_fits(option.assignment, recipe[key]) for option in of_point]
        for key, of_point in options.items()
    }
    costs = {key: [option.of_sum for option in of_point] for key, of_point in options.items()}
    return order, _made(options, costs, allowed, order, takes)


def _made(options: Options, costs: dict, allowed: dict, order: list[Key], takes: list) -> Terms:
    missed = _table(options, order, lambda key, n: options[key][n].missed)
    # What it misses of what it is given is missed in part once more, and so on: in all 1 / (1 - m).
    # Who sends nothing misses all, once.
    again = torch.where(missed < 1, 1 / (1 - missed.clamp(max=_MOST_MISSED)), 1)
    handed_on = _table(options, order, lambda key, n: costs[key][n].handed_on)
    return Terms(
        bits=_table(options, order, lambda key, n: options[key][n].bits_per_value),
        own=_table(
            options,
            order,
            lambda key, n: costs[key][n].divergence if allowed[key][n] else torch.inf,
            missing=torch.inf,
        ),
        handed_on=handed_on * again,
        missed=missed,
        takes=takes,
    )


def _table(options: Options, order: list[Key], value, *, missing: float = 0.0) -> torch.Tensor:
    """fp64 ``[points, options]``, `missing` where a sync point has fewer options than others."""
    most = max(map(len, options.values()))
    rows = [[value(key, n) for n in range(len(options[key]))] for key in order]
    padded = [row + [missing] * (most - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.float64)


def _in_order(options: Options, following: Following) -> tuple[list[Key], list[bool]]:
    """The sync points, chain after chain, and whether each takes errors of the one before."""
    order: list[Key] = []
    takes: list[bool] = []
    taking = set(following.values())
    for key in options:
        if key in taking:
            continue
        link: Key | None = key
        while link is not None:
            order.append(link)
            takes.append(link is not key)
            link = following.get(link)
    return order, takes


def _option(options: Options, recipe: Recipe, key: Key, *, sums: bool = False) -> Option:
    """The option that a recipe has for partials or for sums."""
    assigned = recipe[key]
    if isinstance(assigned.bits, tuple):
        assigned = replace(assigned, bits=assigned.bits[sums])
    for option in options[key]:
        if option.assignment == assigned:
            return option
    layer, name = key
    raise LowbitError(
        f"the recipe has {assigned} at layer {layer} {name}, which is none of the options that it "
        "was planned from: calibrate this model anew"
    )


def _fits(option: Assignment, partials: Assignment) -> bool:
    """Whether sums can have an option where partials have an assignment."""
    sends_nothing = option == SKIP, partials == SKIP
    alike = replace(option, bits=None) == replace(partials, bits=None)
    return alike and sends_nothing[0] == sends_nothing[1]


def _with_sum_bits(partials: Assignment, sums: Assignment) -> Assignment:
    if partials.bits == sums.bits:
        return partials
    assert isinstance(partials.bits, int), "options have the same bits twice"
    assert isinstance(sums.bits, int), "options have the same bits twice"
    return replace(partials, bits=(partials.bits, sums.bits))


def _average(options: list[Option]) -> float:
    return sum(option.bits_per_value for option in options) / len(options)
