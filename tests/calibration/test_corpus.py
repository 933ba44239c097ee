"""Corpora: formats, sequences, and one line for everything that can be wrong with a file."""

import hashlib
import json
import os

import pytest
import torch

from megatron_lowbit.calibration.corpus import poverty, read_corpus
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
        ("no.jsonl", b'{"text": "\\ud800"}', "no.jsonl, line 1 is not .*lone surrogate"),
        ("no.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, "line 2 is not .*nested"),
        ("no.jsonl", b'{"text": "a", "text": "b"}', "line 1 is not .*twice"),
        ("no.txt", b"a" * 70_000 + b"\xe6\x97", "not UTF-8 .byte 70000"),
        ("no.txt", b"\xef\xbb\xbf" + b"a" * 70_000 + b"\xffa", "not UTF-8 .byte 70003"),
        ("no.txt", b"\xef\xbb\xbf", "no.txt is empty"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read_corpus([tmp_path / name], tokenize)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "c"}\r\n')
    corpus = read_corpus([tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenize)
    assert corpus.tokens.tolist() == [ord(letter) for letter in "abc"]
    data = (tmp_path / "a.txt").read_bytes() + (tmp_path / "b.jsonl").read_bytes()
    assert corpus.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("letters", ["aé日🙂\n", "日"])
def test_a_text_is_the_same_however_it_is_cut(tmp_path, letters):
    """Files are read in pieces of bytes: letters of several bytes lie across their ends."""
    text = letters * 40_000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": text.replace("\n", " ")}, ensure_ascii=False)
    )
    for name, expected in (("a.txt", text), ("b.jsonl", text.replace("\n", " "))):
        tokens = read_corpus([tmp_path / name], tokenize).tokens
        assert torch.equal(tokens, torch.tensor(tokenize(expected)))


def test_a_fifo_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(CorpusError, match="a.txt is not a regular file"):
        read_corpus([tmp_path / "a.txt"], tokenize)


def test_poor_texts_are_told_from_others():
    the = torch.tensor([262]).expand(32, 128)
    assert poverty(the) == (
        "the text is poor: 1 different tokens in 4,096, the most frequent is 100% of them"
    )
    assert "31 different tokens" in poverty(torch.arange(31).repeat(100))
    mostly = torch.cat([torch.zeros(600, dtype=torch.int64), torch.arange(500)])
    assert "the most frequent is 55% of them" in poverty(mostly)
    assert poverty(torch.arange(32).repeat(4)) is None
