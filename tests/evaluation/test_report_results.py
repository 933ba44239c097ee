"""Evaluation files that are not what they should be: one line with the file and the key."""

import json

import pytest
import report_sample as sample
from json_places import REMOVED, changed, put

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.output import read_summary

pytest.importorskip("pydantic")
from megatron_lowbit.evaluation.report.results import read_results  # noqa: E402


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("format", REMOVED, r"format is null, this release reads 2 and 3"),
        ("format", 1, r"format is 1, this release reads 2 and 3"),
        ("format", True, "format is true"),
        ("format", 3.0, "format is 3.0"),
        ("simulated", REMOVED, r"simulated: Field required"),
        ("model", "a\0b", "model: .*control character"),
        ("model", "\ud800", "not valid JSON .*lone surrogate"),
        ("tp_size", "3", r"tp_size: .*integer"),
        ("tp_size", 3.0, r"tp_size: .*valid integer \(3.0\)"),
        ("tp_size", True, r"tp_size: .*valid integer"),
        ("tp_size", 0, r"tp_size: .*greater than or equal to 1"),
        ("tp_size", 1 << 40, r"tp_size: .*less than or equal"),
        ("variants/0/variant", [], r"variants\[0\]\.variant: .*string"),
        ("variants/1/variant", "bf16", r"variants has 'bf16' more than once"),
        ("texts/0/tokens", -1, r"texts\[0\]\.tokens: .*greater than or equal to 0"),
        ("texts/0/results/0/kl", "0.1", r"texts\[0\]\.results\[0\]\.kl: .*number"),
        ("texts/0/results/0/kl", True, r"texts\[0\]\.results\[0\]\.kl: .*number"),
        ("texts/0/results/1/kl", REMOVED, r"texts\[0\]\.results\[1\]\.kl: Field required"),
        ("tasks", REMOVED, r"tasks: Field required"),
        ("tasks/0/metric", "f1", r"tasks\[0\]\.metric: .*acc"),
        ("long_context/0/results/0/kl", [1.0], r"long_context\[0\]: .*buckets"),
        ("generation/0/results/0/variant", "x", r"variant 'x': variants lacks it"),
        ("sync_points/points/0/sqnr/x", 1.0, r"variant 'x': variants lacks it"),
    ],
)
def test_a_bad_value_is_one_line_with_its_file_and_key(tmp_path, place, value, message):
    content = sample.evaluation(layers=2)
    put(content, place, value)
    path = sample.write(content, tmp_path / "bad.json")
    with pytest.raises(LowbitError, match=message) as error:
        read_results([path])
    assert str(error.value).startswith(f"{path}") and str(error.value).isprintable()


@pytest.mark.parametrize("value", [[[]] * 3, {"variant": []}])
def test_what_the_report_does_not_show_may_be_anything(tmp_path, value):
    content = sample.evaluation(layers=2) | {"extra": value}
    assert read_results([sample.write(content, tmp_path / "more.json")])


def test_files_of_the_format_before_are_read(tmp_path):
    """In which the name of a variant was under ``codec``."""
    content = sample.evaluation(layers=2)
    old = changed(content, key=lambda k: "codec" if k == "variant" else k) | {"format": 2}
    assert '"variant"' not in json.dumps(old) and content["format"] == 3
    one = sample.write(content, tmp_path / "new.json")
    two = sample.write(old, tmp_path / "old.json")
    assert read_summary(two) == content
    new, before = read_results([one, two])
    assert new.data == before.data


def test_numbers_beyond_all_bounds_are_as_good_as_none(tmp_path):
    content = sample.evaluation(layers=2)
    content["texts"][0]["results"][0]["kl"] = 1e308
    content["texts"][0]["results"][1]["kl"] = 1e20
    path = sample.write(content, tmp_path / "huge.json")
    first, second, *_ = read_results([path])[0].data.texts[0].results
    assert (first.kl, second.kl) == (None, 1e20)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "1" * 400])
def test_no_evaluation_at_all(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(LowbitError, match=r"bad\.json"):
        read_results([tmp_path / "bad.json"])
