"""The one reader of JSON: what is no JSON, or no file, is one line with its path, at once."""

import json
import os
import socket

import pytest

from megatron_lowbit import json_files
from megatron_lowbit.errors import IndexFileError, LowbitError
from megatron_lowbit.json_files import parse_json, read_json, shown


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff{}", "not UTF-8: byte 0"),
        (b"[" * 100_000, "nested deeper than 64 levels"),
        (b'{"a":' * 100_000, "nested deeper than 64 levels"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64 levels"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "has the key 'c' twice"),
        (b"1" * 400, "an integer of 400 digits is beyond 64 bits"),
        (b"9223372036854775808", "an integer of 19 digits"),
        (b"-" + b"1" * 5000, "an integer of 5000 digits"),
        (b"[1e400]", "the number 1e400 is beyond a double"),
        (b"[NaN]", "NaN is no JSON"),
        (b"[-Infinity]", "-Infinity is no JSON"),
        (b'"\\ud800"', r"the text '\\ud800' has a lone surrogate"),
        (b'{"\\uDFFF": 1}', "has a lone surrogate"),
        (b'[["\\udbff x"]]', "has a lone surrogate"),
    ],
)
def test_what_is_no_json_is_one_line(tmp_path, data, message):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(IndexFileError, match=message) as error:
        read_json(path, error=IndexFileError, remedy="make it again")
    text = str(error.value)
    assert text.startswith(str(path)) and text.endswith(": make it again")
    assert text.isprintable() and len(text) < 500


@pytest.mark.parametrize(
    ("data", "value"),
    [
        ('\ufeff{"a": [1, 2.5, null, true]}', {"a": [1, 2.5, None, True]}),
        ('"\\ud83d\\ude00"', "😀"),
        ("9223372036854775807", 2**63 - 1),
        ("1e308", 1e308),
        ("[" * 64 + "]" * 64, json.loads("[" * 64 + "]" * 64)),
    ],
)
def test_what_is_json_is_read(tmp_path, data, value):
    (tmp_path / "a.json").write_text(data)
    assert read_json(tmp_path / "a.json") == value


def test_constants_become_what_the_caller_says():
    assert parse_json("[NaN, 1]", "x", constant=lambda name: None) == [None, 1]


def _socket(path):
    os.chdir(path.parent)  # its name has to be short
    socket.socket(socket.AF_UNIX).bind(path.name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "is not a regular file"),
        (_socket, "is not a regular file"),
        (lambda path: path.mkdir(), "is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
        (lambda path: None, "cannot read .*No such file"),
        (lambda path: path.symlink_to(path), "cannot read .*symbolic links"),
    ],
)
def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a.json")
    with pytest.raises(LowbitError, match=message):
        read_json(tmp_path / "a.json")


def test_a_large_file_is_refused_before_it_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "LARGEST", 100)
    (tmp_path / "a.json").write_text("[" + "1," * 100 + "1]")
    with pytest.raises(LowbitError, match=r"a.json has more than 100 bytes"):
        read_json(tmp_path / "a.json")
    with (tmp_path / "sparse.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(LowbitError, match=r"sparse.json has more than 100 bytes"):
        read_json(tmp_path / "sparse.json")


def test_bad_values_are_shown_in_one_short_line():
    for value in ("a\nb", "x" * 1000, 10**5000, [1] * 1000, "\0"):
        assert shown(value).isprintable() and len(shown(value)) < 80
