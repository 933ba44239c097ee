"""Models that are damaged, or whose parts disagree: one line, and no checkpoint.

Conversion runs in this process up to the weights, which are all read as Megatron's parameters; only
Megatron itself is left out. The command line as such is tried on a few in a process of its own.
"""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from damaged_models import DAMAGES, GGUF, GGUF_DAMAGES  # noqa: E402

from megatron_lowbit.errors import LowbitError  # noqa: E402
from megatron_lowbit.integration.convert import (  # noqa: E402
    conversion,
    convert_command,
    hf_source,
    translate,
)
from megatron_lowbit.integration.convert.weights import open_weights  # noqa: E402


def read_all(arch, args, get, *, directory, progress):
    """Stands for `conversion._write`: every weight is read and translated, nothing written."""
    translate.outer_weights(get, arch)
    for layer in range(arch.layers):
        translate.layer_weights(get, arch, layer)


@pytest.fixture
def convert(monkeypatch, tmp_path, capfd):
    """Converts a model by the command line's `main`, into `out` beside it; no answer on stdin."""
    monkeypatch.setattr(conversion, "_write", read_all)
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail(f"asked: {text}"))

    def run(model: Path, *more: str) -> None:
        try:
            convert_command.main(["--model", str(model), "--save", str(tmp_path / "out"), *more])
        finally:
            assert capfd.readouterr().err == "", "a library said more than our line"

    return run


def refusal(convert, model: Path, *more: str) -> str:
    """The line that refuses `model`; nothing is left of the try."""
    before = sorted(path.name for path in model.parent.iterdir())
    with pytest.raises((LowbitError, OSError)) as caught:
        convert(model, *more)
    assert sorted(path.name for path in model.parent.iterdir()) == before
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 600, message
    return message


def test_a_whole_model_is_converted(whole, convert, tmp_path):
    convert(whole)
    assert (tmp_path / "out" / "tokenizer").is_dir()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_gets_one_line(whole, convert, tmp_path, name):
    damage, words = DAMAGES[name]
    shutil.copytree(whole, tmp_path / "model")
    damage(tmp_path / "model")
    message = refusal(convert, tmp_path / "model")
    assert str(tmp_path / "model") in message
    assert all(word in message for word in words), message


@pytest.fixture(scope="module")
def gguf_file(whole) -> Path:
    pytest.importorskip("gguf")
    from tiny_gguf import write_gguf

    write_gguf(whole, whole.with_name(GGUF))
    return whole.with_name(GGUF)


def test_a_whole_gguf_file_is_converted(gguf_file, convert, tmp_path):
    convert(gguf_file)
    assert (tmp_path / "out" / "tokenizer").is_dir()


@pytest.mark.parametrize("name", GGUF_DAMAGES)
def test_a_damaged_gguf_file_gets_one_line(whole, gguf_file, convert, tmp_path, name):
    damage, words = GGUF_DAMAGES[name]
    shutil.copytree(whole, tmp_path / "model")
    shutil.copy(gguf_file, tmp_path)
    damage(tmp_path)
    message = refusal(convert, tmp_path / gguf_file.name)
    assert all(word in message for word in [GGUF, *words]), message


FILES = ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors", GGUF]
PIECES = [*b"0 -1 1e999 NaN null [] {} [[[[ \xff".split(), bytes(8), b"\xff" * 8]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(FILES),
    edits=st.lists(st.tuples(st.integers(0, 2500), st.sampled_from(PIECES)), min_size=1),
)
def test_any_edit_is_read_or_refused_in_one_line(whole, gguf_file, name, edits):
    """Somewhere in the first 2500 bytes, where the headers are."""
    model = Path(shutil.copytree(whole, whole.with_name("edited"), dirs_exist_ok=True))
    file = Path(shutil.copy(gguf_file if name == gguf_file.name else whole / name, model))
    data = bytearray(file.read_bytes())
    for offset, piece in edits:
        data[offset : offset + len(piece)] = piece
    file.write_bytes(data)
    source = file if file.suffix == ".gguf" else model
    try:
        arch = hf_source.read_config(source)
        hf_source.load_tokenizer(source, arch.vocab)
        with open_weights(source, arch, torch.bfloat16) as get:
            read_all(arch, None, get, directory=None, progress=False)
    except (LowbitError, OSError) as error:
        assert len(str(error).splitlines()) == 1
