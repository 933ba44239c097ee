"""Reading Llama-family models: a Hugging Face directory (safetensors) or a GGUF file.

`read_config` gives the architecture and refuses what Megatron's GPTModel would not match;
`open_weights` gives the weights one by one under their Hugging Face names.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.errors import LowbitError

# Megatron's rotary embedding has these Llama-3 constants in its code; only the factor is free.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

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


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What Megatron has to know about a Llama model; sizes in features, heads or tokens."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    norm_epsilon: float
    rope_theta: int
    rope_factor: float | None
    tied: bool

    @classmethod
    def from_hf(cls, config: Any) -> Architecture:
        """Reads a transformers configuration; refuses what Megatron's GPTModel would not match."""
        _refuse_unsupported(config)
        theta, factor = _rope(config)
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab=config.vocab_size,
            max_positions=config.max_position_embeddings,
            # GGUF keeps it in fp32: 1e-5 comes back as 9.999999747378752e-06.
            norm_epsilon=float(f"{config.rms_norm_eps:.7g}"),
            rope_theta=theta,
            rope_factor=factor,
            tied=bool(config.tie_word_embeddings),
        )

    def check_tensor_parallel(self, ranks: int) -> None:
        """Raises LowbitError where `ranks` does not divide the heads, KV heads or FFN."""
        common = math.gcd(self.heads, self.kv_heads, self.ffn)
        if ranks < 1 or common % ranks:
            allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise LowbitError(
                f"tensor parallel size {ranks} does not divide {self.heads} heads, "
                f"{self.kv_heads} KV heads and {self.ffn} FFN features; allowed: {allowed}"
            )


def _refuse_unsupported(config: Any) -> None:
    """Raises LowbitError naming the first thing of `config` that is not supported."""
    names = getattr(config, "architectures", None) or [f"model type {config.model_type}"]
    if config.model_type not in ("llama", "mistral"):
        raise LowbitError(
            f"{names[0]} is not supported: only LlamaForCausalLM and MistralForCausalLM are"
        )
    if getattr(config, "sliding_window", None):
        raise LowbitError(f"sliding window attention ({config.sliding_window}) is not supported")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise LowbitError(f"{name} is not supported")
    if config.hidden_act not in ("silu", "swish"):
        raise LowbitError(f"activation {config.hidden_act!r} is not supported, only 'silu' is")


def _rope(config: Any) -> tuple[int, float | None]:
    """The rotary base, and the Llama-3 scaling factor or None."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    # transformers before 5 keeps the base beside the scaling instead of in it.
    rope = rope or dict(getattr(config, "rope_scaling", None) or {})
    theta = rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
    if theta != int(theta):
        raise LowbitError(f"rope_theta {theta} is not supported: Megatron wants a whole number")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise LowbitError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return int(theta), None
    if kind != "llama3":
        raise LowbitError(f"rope scaling {kind!r} is not supported, only 'llama3' is")
    for name, value in _LLAMA3_ROPE.items():
        if rope.get(name) != value:
            raise LowbitError(
                f"rope scaling {name}={rope.get(name)} is not supported, only {value}"
            )
    return int(theta), float(rope["factor"])


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
    return Architecture.from_hf(config)


def location(path: Path) -> tuple[str, dict[str, str]]:
    """How transformers names `path`: a directory, and the GGUF file in it."""
    if path.is_dir():
        return str(path), {}
    return str(path.parent), {"gguf_file": path.name}


def load_tokenizer(path: Path) -> Any:
    """The transformers tokenizer of the model at `path`."""
    with one_line_errors(path):
        from transformers import AutoTokenizer

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
        """Raises LowbitError where a parameter was left over: the model is more than a Llama."""
        # Old checkpoints store the rotary table; tied models may store the output layer again.
        spare = ("rotary_emb.inv_freq", "lm_head.weight")
        left = sorted(name for name in self.unused if not name.endswith(spare))
        if left:
            raise LowbitError(
                f"{self.path}: {len(left)} parameters have no place in Megatron's Llama model, "
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
    """A GGUF file, mapped into memory and dequantized to fp32 tensor by tensor."""

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
