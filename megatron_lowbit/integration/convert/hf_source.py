"""Reading models: a Hugging Face directory (safetensors) or a GGUF file.

`read_config` gives the architecture and refuses what Megatron's GPTModel would not match;
`open_weights` gives the weights one by one under their Hugging Face names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.convert.families import Architecture

# GGUF's names of the parameters; "{}" is the layer.
_GGUF_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@contextlib.contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Turns what transformers raises on a damaged or foreign model into one line naming `path`."""
    try:
        yield
    except LowbitError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        first = str(error).strip().split("\n")[0]
        raise LowbitError(f"{path}: not a model that transformers can read: {first}") from error


def read_config(path: Path) -> Architecture:
    """The architecture of a Hugging Face directory or a GGUF file.

    Raises:
        LowbitError: Nothing is there, it is not a model, or it is not supported.
    """
    if not path.exists():
        raise LowbitError(f"{path}: no such file or directory")
    if path.is_dir() and not (path / "config.json").is_file():
        raise LowbitError(f"{path}: not a Hugging Face model directory, it has no config.json")
    if path.is_file() and path.suffix != ".gguf":
        raise LowbitError(f"{path}: neither a Hugging Face model directory nor a .gguf file")
    with one_line_errors(path):
        from transformers import AutoConfig

        where, options = location(path)
        config = AutoConfig.from_pretrained(where, **options)
    arch = Architecture.of(config)
    if path.is_file() and not arch.family.gguf:
        raise LowbitError(
            f"{path}: GGUF files of {arch.family.model_class} are not supported: convert from the "
            "Hugging Face directory"
        )
    return arch


def location(path: Path) -> tuple[str, dict[str, str]]:
    """How transformers names `path`: a directory, and the GGUF file in it."""
    if path.is_dir():
        return str(path), {}
    return str(path.parent), {"gguf_file": path.name}


def load_tokenizer(path: Path) -> Any:
    """The transformers tokenizer of the model at `path`.

    Raises:
        LowbitError: It has none, or one that cannot be read here.
    """
    with one_line_errors(path):
        from transformers import AutoTokenizer, utils

        # transformers would ask for tiktoken, which cannot read it.
        old = (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file()
        if old and not utils.is_protobuf_available():
            raise LowbitError(
                f"{path}: its tokenizer is there only as tokenizer.model: install protobuf to "
                "read it, or add its tokenizer.json"
            )
        where, options = location(path)
        return AutoTokenizer.from_pretrained(where, **options)


class Weights:
    """A model's parameters by Hugging Face name; remembers what was asked for."""

    def __init__(self, path: Path, names: set[str]) -> None:
        self.path = path
        self.unused = names

    def __call__(self, name: str) -> torch.Tensor:
        """Reads one parameter.

        Raises:
            LowbitError: The model does not have it.
        """
        if name not in self.unused:
            raise LowbitError(f"{self.path}: the weights lack {name}")
        self.unused.discard(name)
        return self._read(name)

    def check_all_used(self) -> None:
        """Raises LowbitError where a parameter was left over: it has no place in Megatron's."""
        # Old checkpoints store the rotary table; tied models may store the output layer again.
        spare = ("rotary_emb.inv_freq", "lm_head.weight")
        left = sorted(name for name in self.unused if not name.endswith(spare))
        if left:
            raise LowbitError(
                f"{self.path}: {len(left)} parameters have no place in Megatron's GPTModel, "
                f"the first is {left[0]}"
            )

    def _read(self, name: str) -> torch.Tensor:
        raise NotImplementedError


class SafetensorsWeights(Weights):
    """The `*.safetensors` files of a directory, read tensor by tensor."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        from safetensors import safe_open

        with one_line_errors(path):
            files = [
                stack.enter_context(safe_open(file, framework="pt"))
                for file in sorted(path.glob("*.safetensors"))
            ]
        # A safe_open handle is no dict.
        self._file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        if not files:
            raise LowbitError(f"{path}: no *.safetensors files")
        super().__init__(path, set(self._file_of))

    def _read(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)


class GgufWeights(Weights):
    """A Llama's GGUF file, mapped into memory and dequantized to fp32 tensor by tensor."""

    def __init__(self, path: Path, arch: Architecture) -> None:
        from gguf import GGUFReader

        self._arch = arch
        with one_line_errors(path):
            tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        if "rope_freqs.weight" in tensors:
            raise LowbitError(
                f"{path}: Llama-3 rope scaling is not read from GGUF files: convert from the "
                "Hugging Face directory"
            )
        self._tensors = {_hugging_face_name(name): tensor for name, tensor in tensors.items()}
        super().__init__(path, set(self._tensors))

    def _read(self, name: str) -> torch.Tensor:
        from gguf import dequantize

        tensor = self._tensors[name]
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        heads = {"q_proj.weight": self._arch.heads, "k_proj.weight": self._arch.kv_heads}
        for ending, count in heads.items():
            if name.endswith(ending):
                return _half_split_rotary(weight, count)
        return weight


def _hugging_face_name(gguf_name: str) -> str:
    """The Hugging Face name of a GGUF tensor, or the same name where there is none."""
    outer = {theirs: ours for ours, theirs in _GGUF_OUTER.items()}
    inner = {theirs: ours for ours, theirs in _GGUF_LAYER.items()}
    parts = gguf_name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in inner:
        return f"model.layers.{parts[1]}.{inner[parts[2]]}.{parts[3]}"
    return outer.get(gguf_name, gguf_name)


def _half_split_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's order of a head's rows: its rotary pairs are neighbours, ours halves."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)


@contextlib.contextmanager
def open_weights(path: Path, arch: Architecture) -> Iterator[Weights]:
    """Gives the weights at `path` for the duration of the block.

    Raises:
        LowbitError: The files are missing or damaged.
    """
    with contextlib.ExitStack() as stack:
        yield GgufWeights(path, arch) if path.is_file() else SafetensorsWeights(path, stack)
