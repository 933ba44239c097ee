"""Evaluation files that are not what they should be: one line with the file and the key."""

import pytest
import report_sample as sample

from megatron_lowbit.errors import LowbitError

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


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_no_evaluation_at_all(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(LowbitError, match=r"bad\.json"):
        read_results([tmp_path / "bad.json"])
