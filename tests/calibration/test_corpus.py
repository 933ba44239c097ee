"""Corpora: formats, sequences, and one line for everything that can be wrong with a file."""

import pytest
import torch

from megatron_lowbit.calibration.corpus import read_corpus
from megatron_lowbit.errors import CorpusError


def tokenize(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_txt_and_jsonl_are_read_in_order(tmp_path):
    (tmp_path / "a.txt").write_text("ab\n")
    (tmp_path / "b.jsonl").write_text('{"text": "c\\u2028d"}\n\n{"text": "e", "other": 1}')
    corpus = read_corpus([tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenize)
    assert corpus.tokens.tolist() == [ord(c) for c in "ab\nc\u2028de"]
    assert corpus.names == ["a.txt", "b.jsonl"]
    (tmp_path / "a.txt").write_text("ac\n")
    changed = read_corpus([tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenize)
    assert changed.sha256 != corpus.sha256


def _corpus(tmp_path, length):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(33 + i) for i in range(length)))
    return read_corpus([path], tokenize)


def test_samples_do_not_overlap_and_depend_on_the_seed_only(tmp_path):
    corpus = _corpus(tmp_path, 50)
    sample = corpus.sample(9, 5, seed=1)
    assert sample.shape == (9, 5)
    assert len(set(sample.flatten().tolist())) == 45
    assert torch.equal(sample, corpus.sample(9, 5, seed=1))
    assert not torch.equal(sample, corpus.sample(9, 5, seed=2))


def test_first_predicts_each_token_once(tmp_path):
    sequences = _corpus(tmp_path, 11).first(2, 5)
    assert (sequences - 33).tolist() == [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]]


def test_too_short_names_both_numbers(tmp_path):
    corpus = _corpus(tmp_path, 50)
    with pytest.raises(CorpusError, match="50 tokens are 10 sequences of 5, 11 were asked for"):
        corpus.sample(11, 5, seed=0)
    with pytest.raises(CorpusError, match="9 sequences of 5, 10 were"):
        corpus.first(10, 5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.txt", None, "cannot read .*no.txt: No such file"),
        ("no.csv", b"a", "no.csv is neither .txt nor .jsonl"),
        ("no.txt", b"", "no.txt is empty"),
        ("no.jsonl", b"\n\n", "no.jsonl is empty"),
        ("no.txt", b"ab\xff", "not UTF-8 .byte 2"),
        ("no.jsonl", b'{"text": "a"}\n{"text"', "no.jsonl, line 2 is not"),
        ("no.jsonl", b'{"body": "a"}', "no.jsonl, line 1 is not"),
        ("no.jsonl", b'["text"]', "no.jsonl, line 1 is not"),
        ("no.jsonl", b'{"text": 3}', "no.jsonl, line 1 is not"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read_corpus([tmp_path / name], tokenize)
