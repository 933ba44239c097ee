"""What a model says of itself: its architecture and its tokenizer.

A model is a Hugging Face directory or a GGUF file. `read_config` gives the architecture and refuses
what Megatron's GPTModel would not match. No code of a model is run; its weights are for
`weights.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.convert import config_numbers
from megatron_lowbit.integration.convert.families import Architecture
from megatron_lowbit.integration.convert.weights import read_gguf
from megatron_lowbit.integration.runtime.model_files import (
    check_file,
    last_token,
    one_line_errors,
    read_json,
    refuse_own_code,
)
from megatron_lowbit.integration.runtime.quiet import quiet

# What transformers reads of a tokenizer, if it is there.
_TOKENIZER_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_TOKENIZER_FILES = ("tokenizer.model", "merges.txt", "chat_template.jinja")


def read_config(path: Path) -> Architecture:
    """The architecture of a Hugging Face directory or a GGUF file.

    Raises:
        LowbitError: Nothing is there, it is not a model, it asks for code of its own, or it is not
            supported.
    """
    if not path.exists():
        raise LowbitError(f"{path}: no such file or directory")
    return _read_directory(path) if path.is_dir() else _read_gguf(path)


def _read_directory(path: Path) -> Architecture:
    if not (path / "config.json").exists():
        raise LowbitError(f"{path}: not a Hugging Face model directory, it has no config.json")
    if (path / "adapter_config.json").exists():
        raise LowbitError(
            f"{path}: adapter_config.json: an adapter is not supported, merge it into its model"
        )
    refuse_own_code(path)
    said = read_json(path / "config.json")
    with _naming(path / "config.json"):
        config_numbers.check_raw(said)
        arch = Architecture.of(_config(path), stops=said.get("eos_token_id"))
    generation = path / "generation_config.json"
    stops = read_json(generation).get("eos_token_id") if generation.exists() else None
    if stops is None:
        return arch
    with _naming(generation):
        return dataclasses.replace(arch, stops=config_numbers.token_ids(stops, arch.vocab))


def _read_gguf(path: Path) -> Architecture:
    if path.suffix != ".gguf":
        raise LowbitError(f"{path}: neither a Hugging Face model directory nor a .gguf file")
    get = _gguf_field(path)
    with _naming(path):
        config_numbers.check_gguf(get)
        config = _config(path)
        arch = Architecture.of(config, stops=getattr(config, "eos_token_id", None))
    if not arch.family.gguf:
        raise LowbitError(
            f"{path}: GGUF files of {arch.family.model_class} are not supported: convert from the "
            "Hugging Face directory"
        )
    with _naming(path):
        config_numbers.check_gguf_complete(get)
    return arch


def _gguf_field(path: Path):
    """A function that gives a field of the file's architecture, or None."""
    reader = read_gguf(path)

    def value(name: str) -> Any:
        field = reader.fields.get(name)
        with one_line_errors(path, f"{name} cannot be read"):
            return None if field is None else field.contents()

    kind = value("general.architecture")
    return lambda name: value(f"{kind}.{name}")


def _config(path: Path) -> Any:
    """transformers' configuration of the model at `path`."""
    file = path / "config.json" if path.is_dir() else path
    with quiet(), one_line_errors(file, "not a model that transformers can read"):
        from transformers import AutoConfig

        with location(path) as (where, options):
            return AutoConfig.from_pretrained(where, **options)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts a file's name before the message of a LowbitError that has none."""
    try:
        yield
    except LowbitError as error:
        if str(path.parent) in str(error):
            raise
        raise LowbitError(f"{path}: {error}") from error


@contextlib.contextmanager
def location(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """How transformers names `path`: a directory, and the GGUF file in it; no code, no hub.

    A GGUF file is shown to it alone: it would prefer a tokenizer.json beside it, whosever that is.
    """
    safe = {"trust_remote_code": False, "local_files_only": True}
    if path.is_dir():
        yield str(path), safe
        return
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / path.name).symlink_to(path.resolve())
        yield alone, {"gguf_file": path.name, **safe}


def load_tokenizer(path: Path, vocab: int) -> Any:
    """The transformers tokenizer of the model at `path`, whose vocabulary has `vocab` tokens.

    Raises:
        LowbitError: It has none, one that cannot be read here, or one with more tokens.
    """
    if path.is_dir():
        _check_tokenizer_files(path)
    with quiet(), one_line_errors(path, "its tokenizer cannot be read"):
        from transformers import AutoTokenizer

        with location(path) as (where, options):
            made = AutoTokenizer.from_pretrained(where, **options)
        last, probe = last_token(made), made.encode("a b")
    if not probe:
        raise LowbitError(f"{path}: its tokenizer makes no tokens of a text")
    if last >= vocab:
        raise LowbitError(
            f"{path}: its tokenizer has tokens up to {last}, the model's vocabulary ends at "
            f"{vocab - 1}: take them out of the tokenizer, or use the model's own"
        )
    return made


def saved_tokenizer(directory: Path, flag: str) -> Any:
    """The tokenizer that conversion saved in `directory`, such as ``CKPT/tokenizer``.

    `flag` is what named it, for messages.

    Raises:
        LowbitError: It has no tokenizer.json, asks for code of its own, or cannot be read.
    """
    if not (directory / "tokenizer.json").is_file():
        raise LowbitError(f"{flag} {directory}: it has no tokenizer.json")
    refuse_own_code(directory)
    return load_tokenizer(directory, vocab=sys.maxsize)  # nothing is looked up


def _check_tokenizer_files(path: Path) -> None:
    """Raises LowbitError where a tokenizer's file is damaged, or needs what is not installed."""
    from transformers import utils

    for name in _TOKENIZER_JSON:
        if (path / name).exists():
            read_json(path / name)
    for name in _TOKENIZER_FILES:
        if (path / name).exists():
            check_file(path / name)
    whole = (path / "tokenizer.json").exists()
    old = (path / "tokenizer.model").exists()
    # transformers would ask for tiktoken, which cannot read it.
    if old and not whole and not utils.is_protobuf_available():
        raise LowbitError(
            f"{path}: its tokenizer is there only as tokenizer.model: install protobuf to "
            "read it, or add its tokenizer.json"
        )
    if not whole and not old and not (path / "vocab.json").exists():
        raise LowbitError(
            f"{path}: it has no tokenizer: no tokenizer.json, tokenizer.model or vocab.json"
        )
