"""Planning against brute force, and budgets that cannot be met."""

import itertools
import random
from dataclasses import replace

import pytest

from megatron_lowbit.calibration.plan import (
    SKIP,
    Cost,
    Option,
    average_bits,
    average_sum_bits,
    plan,
    predicted_divergence,
    with_feedback,
)
from megatron_lowbit.calibration.recipe import Assignment
from megatron_lowbit.errors import LowbitError


def _options(points: int, seed: int) -> dict:
    """Points of very different sensitivity; divergence falls by 4 a bit, with some scatter."""
    generator = random.Random(seed)
    options = {}
    for layer in range(1, points + 1):
        sensitivity = 10 ** generator.uniform(-3, 0)
        options[layer, "mlp.linear_fc2"] = [
            Option(
                Assignment("shaped-hybrid", bits, kept),
                bits + kept / 8,
                Cost(sensitivity * 4.0**-bits * generator.uniform(0.7, 1) / (1 + kept)),
            )
            for bits in (2, 3, 4, 5, 6)
            for kept in (0, 1)
        ]
    return options


def _best(options: dict, budget: float, *following: dict) -> float:
    """The least divergence of all recipes within a budget."""
    return min(
        predicted_divergence(
            options, {k: o.assignment for k, o in zip(options, chosen, strict=True)}, *following
        )
        for chosen in itertools.product(*options.values())
        if sum(o.bits_per_value for o in chosen) <= len(options) * budget + 1e-9
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [2.4, 3.3, 4.2])
def test_close_to_the_best_of_all_within_the_budget(seed, budget):
    options = _options(4, seed)
    recipe = plan(options, budget)
    assert average_bits(options, recipe) <= budget + 1e-9
    # One step of four points may not fit: the relaxed optimum is within that step of the best.
    assert predicted_divergence(options, recipe) <= 2 * _best(options, budget)


def test_more_bits_never_cost_more():
    options = _options(30, 0)
    costs = [predicted_divergence(options, plan(options, b / 10)) for b in range(20, 62)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0] / 100


def test_sensitive_points_get_more_bits():
    options = _options(30, 1)
    recipe = plan(options, 4.2)
    by_sensitivity = sorted(options, key=lambda key: options[key][0].divergence)
    bits = [recipe[key].bits for key in by_sensitivity]
    assert sum(bits[-10:]) / 10 > sum(bits[:10]) / 10 + 1


def test_a_budget_for_everything_takes_the_best_of_each():
    options = _options(3, 2)
    recipe = plan(options, 100)
    assert recipe == {k: min(o, key=lambda x: x.divergence).assignment for k, o in options.items()}


def test_a_budget_below_the_least_is_refused():
    with pytest.raises(LowbitError, match=r"budget of 1.5 bits .* ask for 2.00 or more"):
        plan(_options(3, 0), 1.5)


def _chained(points: int, seed: int) -> tuple[dict, dict]:
    """A chain whose sync points hand errors on, with sums, and which takes whose errors."""
    generator = random.Random(seed)
    options = {}
    for layer in range(1, points + 1):
        partial, passed, total = (10 ** generator.uniform(-3, 0) for _ in range(3))
        options[layer, "mlp.linear_fc2"] = [
            Option(
                Assignment("shaped-hybrid", bits, kept),
                bits + kept / 8,
                Cost(1.0, partial * missed / (1 + kept), passed * missed),
                missed,
                Cost(1.0, total * missed / (1 + kept), passed * missed / 2),
            )
            for bits, missed in ((1, 0.36), (2, 0.12), (3, 0.035), (4, 0.01))
            for kept in (0, 1)
        ]
    return with_feedback(options), dict(itertools.pairwise(options))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1.5, 2.1, 3.0])
def test_neighbours_that_interact_are_planned_together(seed, budget):
    options, following = _chained(4, seed)
    recipe = plan(options, budget, following=following)
    assert average_bits(options, recipe) <= budget + 1e-9
    nats = predicted_divergence(options, recipe, following)
    assert nats <= 1.5 * _best(options, budget, following)
    alone = plan(options, budget)
    assert nats <= predicted_divergence(options, alone, following) + 1e-12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [1.5, 2.1, 3.0])
def test_sums_have_bits_of_their_own_within_the_same_budget(seed, budget):
    options, following = _chained(12, seed)
    recipe = plan(options, budget, following=following)
    assert max(average_bits(options, recipe), average_sum_bits(options, recipe)) <= budget + 1e-9
    assert any(isinstance(assignment.bits, tuple) for assignment in recipe.values())
    for assignment in recipe.values():
        codec = assignment.make()  # a pair that the codec has
        assert min(codec.bits, codec.sum_bits) >= 1
    alike = {key: replace(a, bits=a.make().bits) for key, a in recipe.items()}
    own, same = (
        predicted_divergence(options, one, following, two_shot=True) for one in (recipe, alike)
    )
    assert own < same
    assert predicted_divergence(options, recipe, following) == pytest.approx(
        predicted_divergence(options, alike, following)
    ), "one-shot does not see the bits of sums"


def test_who_sends_nothing_sends_no_sum():
    options, following = _chained(6, 0)
    for of_point in options.values():
        of_point.insert(0, Option(SKIP, 0.0, Cost(1.0, 0.5, 0.5), 1.0, Cost(0.0, 0.0, 0.0)))
    skipped = {list(options)[2]}
    recipe = plan(options, 2.0, following=following, skipped=skipped)
    assert {key for key, assignment in recipe.items() if assignment == SKIP} == skipped
    assert average_sum_bits(options, recipe) <= 2.0


def test_options_of_before_have_one_number_of_bits():
    recipe = plan(_options(10, 0), 4.2)
    assert all(isinstance(assignment.bits, int) for assignment in recipe.values())


def test_a_recipe_that_was_planned_from_other_options_is_named():
    options = _options(3, 0)
    recipe = plan(options, 3.0) | {(2, "mlp.linear_fc2"): Assignment("shaped-hybrid", 9, 0)}
    with pytest.raises(LowbitError, match="9.* at layer 2 mlp.linear_fc2, which is none of the"):
        average_bits(options, recipe)
