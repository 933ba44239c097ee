"""Ends of chains: what a recipe gives to the sync points whose errors nobody repairs."""

from types import SimpleNamespace

import pytest

from megatron_lowbit.calibration.recipe import Assignment
from megatron_lowbit.integration.assignment import with_strong_ends

ATTENTION, MLP = "self_attention.linear_proj", "mlp.linear_fc2"


def _recipe(**changes) -> dict:
    """2 and 3 bits in three layers; `changes` by layer and kind, such as ``m3``."""
    recipe = {}
    for layer in (1, 2, 3):
        for kind, name in (("a", ATTENTION), ("m", MLP)):
            bits = changes.get(f"{kind}{layer}", 2 + layer % 2)
            recipe[layer, name] = Assignment("shaped-hybrid", bits, 0)
    return recipe


def _stage(*layers: int) -> list:
    return [
        SimpleNamespace(layer=layer, name=name, chunk=0, apart="")
        for layer in layers
        for name in (ATTENTION, MLP)
    ]


@pytest.mark.parametrize(
    ("end", "expected"),
    [(6, (6, 6)), ((5, 3), (5, 3)), ((1, 6), (3, 6)), ((6, 1), (6, 2))],
)
def test_the_end_of_a_stage_gets_the_bits_of_the_last_layer_for_partials_and_sums(end, expected):
    recipe = _recipe(m3=end, a3=1, m1=(3, 2))
    raised = with_strong_ends(recipe, _stage(1))
    codec = raised[1, MLP].make()
    assert (codec.bits, codec.sum_bits) == expected
    del raised[1, MLP], recipe[1, MLP]
    assert raised == recipe, "only the end changes"


def test_the_end_that_was_planned_stays_as_it_was_planned():
    for recipe in (_recipe(m3=(4, 2), a3=5), _recipe(m3=1, a3=(2, 6))):
        assert with_strong_ends(recipe, _stage(1, 2, 3)) == recipe


def test_an_end_in_bf16_makes_the_end_of_a_stage_bf16():
    recipe = {**_recipe(), (3, MLP): Assignment("bf16", 16)}
    assert with_strong_ends(recipe, _stage(1, 2))[2, MLP] == Assignment("bf16", 16)


def test_where_all_are_alike_the_end_has_6_bits():
    alike = dict.fromkeys(_recipe(), Assignment("shaped-hybrid", 4))
    changed = with_strong_ends(alike, _stage(1, 2, 3))
    assert changed == {**alike, (3, MLP): Assignment("shaped-hybrid", 6)}
