"""What options are predicted to cost, with gradients and without, against what they do."""

import copy
import io
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import on_each_rank, run_ranks
from torch import nn
from toy_sums import (
    POINTS,
    Cut,
    Eights,
    Opaque,
    Toy,
    ToySumming,
    calibrated,
    language_model,
    sequences,
)

from megatron_lowbit.calibration.costs import option_costs
from megatron_lowbit.calibration.costs.gradients import why_no_gradients
from megatron_lowbit.calibration.costs.neighbours import following_keys
from megatron_lowbit.calibration.index_files import read_index, write_index
from megatron_lowbit.calibration.plan import (
    SKIP,
    average_bits,
    average_sum_bits,
    plan,
    predicted_divergence,
    with_feedback,
)
from megatron_lowbit.calibration.planning import Planner, with_recipe
from megatron_lowbit.calibration.recipe import Assignment

KINDS = {"plain": nn.Linear, "int8": Eights, "cut": Cut, "opaque": Opaque}


def _setting(kind: str = "plain") -> tuple:
    """Model, its sums, its index and texts; the tensor-parallel group is this rank alone."""
    model = Toy(weight=KINDS[kind]).eval()
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    summing = ToySumming(model, groups[dist.get_rank()])
    return model, summing, calibrated(model, summing, sequences(16, 64, seed=1)), sequences(16, 64)


def _measured(model, summing, index, texts, dp_group) -> tuple[dict, str]:
    out = io.StringIO()
    with redirect_stdout(out):
        options = option_costs.measure_options(
            model, summing, index, texts, vocab_size=50, dp_group=dp_group, track=lambda *_: iter
        )
    return options, out.getvalue()


def _work(rank: int) -> dict:
    """Everything, on 1 or 2 data-parallel ranks."""
    result = {}
    for kind in KINDS:
        model, summing, index, texts = _setting(kind)
        result["why", kind] = why_no_gradients(model, summing, texts[0])
    model, summing, index, texts = _setting()
    everyone = dist.group.WORLD
    runs = language_model(model, summing.points[0].group)
    options, _ = _measured(model, summing, index, texts, everyone)
    slow_model, *slow = _setting("int8")
    slowly, said = _measured(slow_model, *slow, everyone)
    result |= {"gradients": options, "forward": slowly, "said": said}
    carried = with_feedback(options)
    planner = Planner(index, runs, summing, texts, carried, everyone, feedback=True)
    for bits in (2, 3, 4):
        for feedback in (False, True):
            one = replace(planner, options=carried if feedback else options, feedback=feedback)
            recipe = dict.fromkeys(options, Assignment("shaped-hybrid", bits, 0))
            predicted = predicted_divergence(one.options, recipe, one.following)
            result["uniform", bits, feedback] = predicted, one.measure(recipe)
    slow_runs = language_model(slow_model, summing.points[0].group)
    slow_planner = replace(planner, model=slow_runs, summing=slow[0], index=slow[1])
    for name, found in (("by gradients", options), ("by divergence", slowly)):
        recipe = plan(with_feedback(found), 3.0, following=planner.following)
        result["recipe", name] = average_bits(options, recipe), slow_planner.measure(recipe)
    return result


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict]]:
    directory = tmp_path_factory.mktemp("costs")
    return {ranks: run_ranks(ranks, _work, directory / str(ranks)) for ranks in (1, 2)}


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_gradients_predict_is_measured(found, bits, feedback):
    predicted, measured = found[1][0]["uniform", bits, feedback]
    assert 0.6 < predicted / measured < 1.7, (predicted, measured)


def test_feedback_is_predicted_to_help(found):
    plain, _ = found[1][0]["uniform", 4, False]
    carried, _ = found[1][0]["uniform", 4, True]
    assert carried < plain / 1.5


def test_more_bits_cost_less_at_every_sync_point(found):
    for kind in ("gradients", "forward"):
        for of_point in found[1][0][kind].values():
            by_bits = [
                o for o in of_point if not o.assignment.bf16_features and o.assignment != SKIP
            ]
            by_bits.sort(key=lambda o: o.bits_per_value)
            for attribute in ("cost", "of_sum"):
                costs = [getattr(o, attribute) for o in by_bits]
                for value in ([c.divergence for c in costs], [c.carried for c in costs]):
                    assert value == sorted(value, reverse=True), (kind, value)
            shares = [o.missed for o in by_bits]
            assert shares == sorted(shares, reverse=True)
            assert 0.25 < shares[0] < 0.5, "of 1 bit: 0.36 if the row is Gaussian"


def test_the_last_sync_point_hands_nothing_on(found):
    for kind in ("gradients", "forward"):
        *others, last = found[1][0][kind].values()
        assert len(others) == POINTS - 1
        assert all(o.cost.handed_on == o.of_sum.handed_on == 0 for o in last)
        assert all(of_point[1].cost.handed_on > 0 for of_point in others)


def test_data_parallel_ranks_agree_with_one(found):
    (alone,), both = found[1], found[2]
    for kind in ("gradients", "forward"):
        assert both[0][kind] == both[1][kind]
        for key, of_point in alone[kind].items():
            for one, other in zip(of_point, both[0][kind][key], strict=True):
                assert one.assignment == other.assignment
                assert one.cost.carried == pytest.approx(other.cost.carried, rel=1e-3)


def test_where_gradients_cannot_be_is_told_and_why(found):
    for rank in (found[1][0], *found[2]):
        assert rank["why", "plain"] == ""
        assert rank["why", "int8"] == "up.0.weight is int8"
        assert rank["why", "cut"].startswith("no gradient goes through ")
        assert "backward" in rank["why", "opaque"]


def test_planning_without_gradients_says_that_it_is_slower_and_why(found):
    said = found[1][0]["said"]
    assert said.count("\n") == 1
    assert "without gradients (up.0.weight is int8)" in said
    assert "slower" in said


def test_a_plan_without_gradients_is_nearly_as_good(found):
    bits, by_gradients = found[1][0]["recipe", "by gradients"]
    other_bits, by_divergence = found[1][0]["recipe", "by divergence"]
    assert max(bits, other_bits) <= 3.0
    assert by_divergence < 1.5 * by_gradients


@on_each_rank(1)
def test_other_errors_are_not_taken_for_a_missing_derivative(rank):
    model, summing, _, texts = _setting()

    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("out of paper")

    model.up[1] = copy.copy(model.up[1])
    model.up[1].__class__ = Broken
    with pytest.raises(RuntimeError, match="out of paper"):
        why_no_gradients(model, summing, texts[0])


@on_each_rank(1)
def test_a_recipe_keeps_both_averages_and_plans_the_same_when_read(rank, tmp_path):
    model, summing, index, texts = _setting()
    runs = language_model(model, summing.points[0].group)
    asked = {"budget": 2.4, "target": None, "dp_group": dist.group.WORLD}
    made = with_recipe(index, model, runs, summing, texts[:4], **asked)
    write_index(made, tmp_path / "lowbit")
    recipe = made.manifest["recipe"]
    assert recipe["bits_per_value"] <= 2.4
    assert recipe["sum_bits_per_value"] <= 2.4
    assert recipe["predicted_divergence"] < recipe["predicted_two_shot"]
    index = read_index(tmp_path / "lowbit")
    options = index.options()
    again = plan(with_feedback(options), 2.4, following=following_keys(summing.points))
    assert again == index.recipe
    assert average_bits(options, again) == pytest.approx(recipe["bits_per_value"])
    assert average_sum_bits(options, again) == pytest.approx(recipe["sum_bits_per_value"])
    assert torch.tensor([o.missed for of in options.values() for o in of]).le(1).all()
