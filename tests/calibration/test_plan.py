"""Planning against brute force, and budgets that cannot be met."""

import itertools
import random

import pytest

from megatron_lowbit.calibration.plan import Option, average_bits, plan, predicted_divergence
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
                sensitivity * 4.0**-bits * generator.uniform(0.7, 1) / (1 + kept),
            )
            for bits in (2, 3, 4, 5, 6)
            for kept in (0, 1)
        ]
    return options


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [2.4, 3.3, 4.2])
def test_close_to_the_best_of_all_within_the_budget(seed, budget):
    options = _options(4, seed)
    recipe = plan(options, budget)
    assert average_bits(options, recipe) <= budget + 1e-9
    best = min(
        sum(o.divergence for o in chosen)
        for chosen in itertools.product(*options.values())
        if sum(o.bits_per_value for o in chosen) <= 4 * budget + 1e-9
    )
    # One step of four points may not fit: the relaxed optimum is within that step of the best.
    assert predicted_divergence(options, recipe) <= 2 * best


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
