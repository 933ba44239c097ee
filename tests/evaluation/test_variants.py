"""Which variants are compared if nobody says."""

import pytest

from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.codecs import CALIBRATED_CODEC
from megatron_lowbit.evaluation.variants import default_variants, parse_variant

CHOICE = {"codec": "shaped-hybrid", "bits": 4, "bf16_features": 0}


@pytest.mark.parametrize(
    ("codec", "recipe", "served"),
    [
        (CALIBRATED_CODEC, {"points": {"1": {"mlp.linear_fc2": CHOICE}}}, "recipe@feedback"),
        (CALIBRATED_CODEC, None, f"{CALIBRATED_CODEC}@feedback"),
        ("scaled-hybrid", None, "scaled-hybrid@feedback"),
        ("static-hybrid", None, "static-hybrid"),
        ("int4-g32", None, "int4-g32"),
    ],
)
def test_what_is_served_is_measured_and_compared(codec, recipe, served):
    """As `apply` serves it, the same without feedback, the same two-shot; each once."""
    manifest = {"codec": {"name": codec}} | ({"recipe": recipe} if recipe else {})
    names = default_variants(CalibrationIndex(manifest, {}))
    assert {served, served.removesuffix("@feedback"), f"{served}@two-shot"} < set(names)
    assert len(names) == len(set(names))
    for name in names:
        variant = parse_variant(name)
        assert variant.has_feedback == ("@feedback" in name)
