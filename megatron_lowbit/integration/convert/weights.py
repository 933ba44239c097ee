"""Reading weights one by one: of a Hugging Face directory (safetensors), or of a GGUF file.

Of a directory exactly the files are read that transformers would read, and only safetensors: a
`.bin` file is a pickle, which can run code.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.convert.families import Architecture
from megatron_lowbit.integration.convert.parameters import (
    EMBEDDING,
    OUTPUT,
    ROTARY,
    Shape,
    check_parameters,
    check_rotary,
    places,
    shapes_of,
)
from megatron_lowbit.integration.runtime.model_files import check_file, one_line_errors, read_json

Shapes = Mapping[str, Shape]
Read = Callable[[str], torch.Tensor]

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names
# GGUF's names of the parameters, and Hugging Face's; without the layer.
_GGUF_OUTER = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": OUTPUT,
}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Weights:
    """A model's parameters by Hugging Face name, checked against its configuration."""

    def __init__(
        self, path: Path, arch: Architecture, shapes: Shapes, read: Read, dtype: torch.dtype
    ) -> None:
        """See `open_weights`; `shapes` and `read` go by the names that weights are stored under."""
        self.path, self._read, self._dtype = path, read, dtype
        self._stored = places(shapes, shapes_of(arch), path)
        check_parameters({n: shapes[s] for n, s in self._stored.items()}, arch, path)
        self._check_unused(arch)

    def __call__(self, name: str) -> torch.Tensor:
        """Reads one parameter.

        Raises:
            LowbitError: It cannot be read, is not finite, or more than `dtype` can hold.
        """
        with one_line_errors(self.path, f"{name} cannot be read"):
            weight = self._read(self._stored[name])
        wrong = int((~weight.isfinite()).sum())
        if wrong:
            raise LowbitError(f"{self.path}: {name}: {wrong} values are NaN or infinite")
        if not weight.to(self._dtype).isfinite().all():
            limit = torch.finfo(self._dtype).max
            raise LowbitError(
                f"{self.path}: {name} has values up to {weight.abs().max().item():.6g}, and "
                f"{str(self._dtype)[6:]} ends at {limit:.6g}: choose another --dtype"
            )
        return weight

    def _check_unused(self, arch: Architecture) -> None:
        """What is stored and not used must say the same; see `check_rotary`."""
        for name in sorted(self._stored):
            if name.endswith(ROTARY):
                check_rotary(name, self(name), arch, self.path)
        if not arch.tied:
            return
        if EMBEDDING not in self._stored:  # transformers ties either to the other
            self._stored[EMBEDDING] = self._stored[OUTPUT]
        elif OUTPUT in self._stored and not torch.equal(self(EMBEDDING), self(OUTPUT)):
            differ = int((self(EMBEDDING) != self(OUTPUT)).sum())
            raise LowbitError(
                f"{self.path}: the config says tie_word_embeddings=true, but {OUTPUT} and "
                f"{EMBEDDING} differ in {differ} values: it must say false"
            )


def _open_directory(path: Path, stack: contextlib.ExitStack) -> tuple[Shapes, Read]:
    """What the safetensors files of a directory hold; `stack` closes them."""
    from safetensors import safe_open

    file_of: dict[str, Any] = {}
    shapes: dict[str, Shape] = {}
    for file in weight_files(path):
        with one_line_errors(file, "not a whole safetensors file: download it again"):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            names = opened.keys()
            slices = {name: opened.get_slice(name) for name in names}
        for name, stored in slices.items():
            if name in file_of:
                raise LowbitError(f"{file}: {name} is in another file, too")
            if stored.get_dtype() not in _FLOATS:
                raise LowbitError(
                    f"{file}: {name} is stored as {stored.get_dtype()}: only floating-point "
                    f"weights ({', '.join(sorted(_FLOATS))}) are supported"
                )
            file_of[name], shapes[name] = opened, tuple(stored.get_shape())
    return shapes, lambda name: file_of[name].get_tensor(name)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that transformers would read: the whole, or those of an index.

    Raises:
        LowbitError: There are none, or one that the index names is missing.
    """
    whole, index = directory / _WHOLE, directory / _INDEX
    if whole.is_file() or (whole.exists() and not index.exists()):
        check_file(whole)
        return [whole]
    if index.exists():
        return _files_of(index)
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise LowbitError(
            f"{directory}: its weights are pickles (.bin, .pt), which can run code and are not "
            f"read: save them as {_WHOLE} first"
        )
    other = sorted(path.name for path in directory.glob("*.safetensors"))
    named = f"; transformers reads no {other[0]}" if other else ""
    raise LowbitError(f"{directory}: it has neither {_WHOLE} nor {_INDEX}{named}")


def _files_of(index: Path) -> list[Path]:
    """The files that an index names."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise LowbitError(f"{index}: it has no weight_map")
    for name in named.values():
        if not (isinstance(name, str) and name.endswith(".safetensors")) or Path(name).name != name:
            raise LowbitError(f"{index}: {name!r} is no safetensors file beside it")
    files = [index.with_name(name) for name in sorted(set(named.values()))]
    for file in files:
        if not file.exists():
            raise LowbitError(f"{file}: no such file, and {index.name} names it")
        check_file(file)
    return files


def read_gguf(path: Path) -> Any:
    """gguf's reader of a file, mapped into memory; kept, since parsing takes seconds.

    Raises:
        LowbitError: It is no whole GGUF file.
    """
    check_file(path)
    state = path.stat()
    return _gguf_reader(path, (state.st_ino, state.st_size, state.st_mtime_ns))


@functools.lru_cache(maxsize=1)
def _gguf_reader(path: Path, state: tuple[int, int, int]) -> Any:
    """As `read_gguf`, for one state of the file."""
    _, size, _ = state
    with one_line_errors(path, "not a whole GGUF file: download it again"):
        from gguf import GGUFReader

        reader = GGUFReader(path)
        end = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
        if end > size:
            raise ValueError(f"it has {size} bytes, its tensors end at {end}")
        return reader


def _open_gguf(path: Path, arch: Architecture) -> tuple[Shapes, Read]:
    """What a Llama's GGUF file holds, to be dequantized to fp32 tensor by tensor."""
    from gguf import dequantize

    tensors = {_hugging_face_name(tensor.name): tensor for tensor in read_gguf(path).tensors}
    if "rope_freqs.weight" in tensors:
        raise LowbitError(
            f"{path}: Llama-3 rope scaling is not read from GGUF files: convert from the "
            "Hugging Face directory"
        )
    heads = {"q_proj.weight": arch.heads, "k_proj.weight": arch.kv_heads}

    def read(name: str) -> torch.Tensor:
        tensor = tensors[name]
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        for ending, count in heads.items():
            if name.endswith(ending):
                return _half_split_rotary(weight, count)
        return weight

    return {name: tuple(map(int, tensor.shape))[::-1] for name, tensor in tensors.items()}, read


def _hugging_face_name(gguf_name: str) -> str:
    """The Hugging Face name of a GGUF tensor, or the same name where there is none."""
    parts = gguf_name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _GGUF_LAYER:
        return f"model.layers.{parts[1]}.{_GGUF_LAYER[parts[2]]}.{parts[3]}"
    return _GGUF_OUTER.get(gguf_name, gguf_name)


def _half_split_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's order of a head's rows: its rotary pairs are neighbours, ours halves."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)


@contextlib.contextmanager
def open_weights(
    path: Path, arch: Architecture, dtype: torch.dtype = torch.float32
) -> Iterator[Weights]:
    """Gives the weights at `path` for the duration of the block.

    Args:
        path: A Hugging Face directory, or a GGUF file.
        arch: What its configuration says: from `read_config`.
        dtype: What they will be stored in, and must fit into.

    Raises:
        LowbitError: Files are missing or damaged, or the weights are not those of `arch`.
    """
    with contextlib.ExitStack() as stack:
        opened = _open_gguf(path, arch) if path.is_file() else _open_directory(path, stack)
        yield Weights(path, arch, *opened, dtype)
