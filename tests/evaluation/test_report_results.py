"""Evaluation files that are not what they should be: one line with the file and the key."""

import json

import pytest
import report_sample as sample

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.output import read_summary

pytest.importorskip("pydantic")
from megatron_lowbit.evaluation.report.results import read_results  # noqa: E402


def _drop(*keys):
    def change(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def _put(value, *keys):
    def change(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("format"), r"format is null, this release reads 2 and 3"),
        (_put(1, "format"), r"format is 1, this release reads 2 and 3"),
        (_drop("simulated"), r"simulated: Field required"),
        (_drop("tasks"), r"tasks: Field required"),
        (_drop("texts", 0, "results", 1, "kl"), r"texts\[0\]\.results\[1\]\.kl: Field required"),
        (_put("0.1", "texts", 0, "results", 0, "kl"), r"texts\[0\]\.results\[0\]\.kl: .*number"),
        (_put("3", "tp_size"), r"tp_size: .*integer"),
        (_put("f1", "tasks", 0, "metric"), r"tasks\[0\]\.metric: .*acc"),
        (_put([1.0], "long_context", 0, "results", 0, "kl"), r"long_context\[0\]: .*buckets"),
        (_put("x", "generation", 0, "results", 0, "variant"), r"variant 'x': variants lacks it"),
        (_put(1.0, "sync_points", "points", 0, "sqnr", "x"), r"variant 'x': variants lacks it"),
        (_put("bf16", "variants", 1, "variant"), r"variants has 'bf16' more than once"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name_and_key(tmp_path, change, message):
    content = sample.evaluation(layers=2)
    change(content)
    path = sample.write(content, tmp_path / "bad.json")
    with pytest.raises(LowbitError, match=message) as error:
        read_results([path])
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def _as_format_2(value):
    """As evaluations were written before: the name of a variant under ``codec``."""
    if isinstance(value, list):
        return [_as_format_2(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {"codec" if k == "variant" else k: _as_format_2(one) for k, one in value.items()}


def test_files_of_the_format_before_are_read(tmp_path):
    content = sample.evaluation(layers=2)
    old = {**_as_format_2(content), "format": 2}
    assert '"variant"' not in json.dumps(old) and content["format"] == 3
    one = sample.write(content, tmp_path / "new.json")
    two = sample.write(old, tmp_path / "old.json")
    assert read_summary(two) == content
    new, before = read_results([one, two])
    assert new.data == before.data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_put(True, "format"), "format is true"),
        (_put(3.0, "format"), "format is 3.0"),
        (_put(3.0, "tp_size"), r"tp_size: .*valid integer \(3.0\)"),
        (_put(True, "tp_size"), r"tp_size: .*valid integer"),
        (_put(0, "tp_size"), r"tp_size: .*greater than or equal to 1"),
        (_put(1 << 40, "tp_size"), r"tp_size: .*less than or equal"),
        (_put(-1, "texts", 0, "tokens"), r"texts\[0\]\.tokens: .*greater than or equal to 0"),
        (_put(True, "texts", 0, "results", 0, "kl"), r"texts\[0\]\.results\[0\]\.kl: .*number"),
        (_put("a\0b", "model"), "model: .*control character"),
        (_put([], "variants", 0, "variant"), r"variants\[0\]\.variant: .*string"),
        (_put("\ud800", "model"), "not valid JSON .*lone surrogate"),
        (_put([[]] * 3, "extra"), None),
        (_put({"variant": []}, "extra"), None),
    ],
)
def test_values_are_not_believed(tmp_path, change, message):
    content = sample.evaluation(layers=2)
    change(content)
    path = sample.write(content, tmp_path / "bad.json")
    if message is None:  # what the report does not show
        assert read_results([path])
        return
    with pytest.raises(LowbitError, match=message) as error:
        read_results([path])
    assert str(path) in str(error.value) and str(error.value).isprintable()


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
