"""Recipe files and their rules: what they change, and every mistake named."""

import json

import pytest

from megatron_lowbit.calibration.recipe import Assignment, override, read_rules
from megatron_lowbit.errors import LowbitError

ATTENTION, MLP = "self_attention.linear_proj", "mlp.linear_fc2"
EVERYWHERE = {
    (layer, name): Assignment("shaped-hybrid", 4, 2)
    for layer in (1, 2)
    for name in (ATTENTION, MLP)
}


def _read(tmp_path, content) -> list[dict]:
    path = tmp_path / "rules.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_rules(path)


def test_the_first_rule_that_matches_counts(tmp_path):
    rules = _read(
        tmp_path,
        [
            {"match": "1.mlp.*", "bits": [3, 6]},
            {"match": "1.*", "codec": "native"},
            {"match": "*.mlp.linear_fc2", "bf16_features": 0},
            {"match": "2.self*", "codec": "rotated-hybrid"},
        ],
    )
    assert override(EVERYWHERE, rules, origin="rules.json") == {
        (1, MLP): Assignment("shaped-hybrid", (3, 6), 2),
        (1, ATTENTION): Assignment("native"),
        (2, MLP): Assignment("shaped-hybrid", 4, 0),
        (2, ATTENTION): Assignment("rotated-hybrid"),  # with its own bits and features
    }


def test_what_no_rule_matches_stays(tmp_path):
    rules = _read(tmp_path, [{"match": "1.mlp.*", "bits": 6}])
    changed = override(EVERYWHERE, rules, origin="rules.json")
    assert {key for key in EVERYWHERE if changed[key] != EVERYWHERE[key]} == {(1, MLP)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "rules.json is not valid JSON"),
        ({"match": "1.*"}, "is not a list of rules"),
        ([], "is not a list of rules"),
        (["1.*"], 'rule 1: not an object with a "match"'),
        ([{"bits": 4}], 'rule 1: not an object with a "match"'),
        ([{"match": "1.*", "bits": 4}, {"match": "2.*", "bit": 4}], "rule 2: bit: Extra inputs"),
        ([{"match": "1.*"}], "rule 1: nothing but a match"),
        ([{"match": "1.*", "codec": "mp3"}], "unknown codec 'mp3': choose one of native, bf16"),
        ([{"match": "1.*", "codec": "native", "bits": 4}], "mean nothing to native"),
        ([{"match": "1.*", "bits": "4"}], "rule 1: bits: '4' is neither"),
        ([{"match": "1.*", "bits": True}], "rule 1: bits: True is neither"),
        ([{"match": "1.*", "bits": [4]}], r"rule 1: bits: \[4\] is neither 0 to 16 bits nor"),
        (
            [{"match": "1.*", "bf16_features": -1}],
            r"rule 1: bf16_features: .*greater than or equal to 0 \(-1\)",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    with pytest.raises(LowbitError, match=message):
        _read(tmp_path, content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(LowbitError, match=r"cannot read .*none.json: No such file"):
        read_rules(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"match": "3.*", "bits": 4}], r"'3\.\*' matches no sync point .* layers 1 to 2 with mlp"),
        (
            [{"match": "*", "bits": 4}, {"match": "1.*", "bits": 5}],
            r"'1\.\*' matches no sync point",
        ),
        (
            [{"match": "1.mlp.*", "bits": 9}],
            r"at 1.mlp.linear_fc2: codec shaped-hybrid has no 9-bit",
        ),
        ([{"match": "1.*", "codec": "bf16", "bf16_features": 3}], "mean nothing to bf16|nothing"),
    ],
)
def test_rules_that_cannot_be_met(rules, message):
    with pytest.raises(LowbitError, match=message):
        override(EVERYWHERE, rules, origin="rules.json")


def test_bits_for_a_point_that_stays_native():
    native = dict.fromkeys(EVERYWHERE, Assignment("native"))
    with pytest.raises(LowbitError, match="mean nothing to native"):
        override(native, [{"match": "*", "bits": 4}], origin="rules.json")
