"""A model's parameters by Hugging Face name: which there must be, and of which shape."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.convert.families import Architecture

Shape = tuple[int, ...]

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# Old checkpoints store the rotary table; transformers leaves it out.
ROTARY = "rotary_emb.inv_freq"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def shapes_of(arch: Architecture) -> dict[str, Shape]:
    """The shape of every parameter that a model of this architecture has, by its name."""
    hidden, query = arch.hidden, arch.heads * arch.head_dim
    outer = {
        EMBEDDING: (arch.vocab, hidden),
        "model.norm.weight": (hidden,),
        OUTPUT: (arch.vocab, hidden),
    }
    rows = {"q": query, "k": arch.kv_heads * arch.head_dim, "v": arch.kv_heads * arch.head_dim}
    inner: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (arch.ffn, hidden),
        "mlp.up_proj.weight": (arch.ffn, hidden),
        "mlp.down_proj.weight": (hidden, arch.ffn),
        **{f"self_attn.{name}_proj.weight": (count, hidden) for name, count in rows.items()},
    }
    if arch.family.qkv_bias:
        inner |= {f"self_attn.{name}_proj.bias": (count,) for name, count in rows.items()}
    if arch.family.qk_norm:
        inner |= {f"self_attn.{name}_norm.weight": (arch.head_dim,) for name in "qk"}
    layers = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(arch.layers)
        for name, shape in inner.items()
    }
    return outer | layers


def place_of(name: str, expected: Mapping[str, Shape]) -> str:
    """Where transformers puts a stored parameter: a model may be saved with or without "model."."""
    without = name.removeprefix("model.")
    if without != name and without in expected:
        return without
    return f"model.{name}" if f"model.{name}" in expected else name


def places(names: Iterable[str], expected: Mapping[str, Shape], path: Path) -> dict[str, str]:
    """The stored name of each parameter, by the name that transformers gives it.

    Raises:
        LowbitError: Two have the same place.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        place = place_of(name, expected)
        if place in found:
            raise LowbitError(f"{path}: {name} and {found[place]} are the same parameter, {place}")
        found[place] = name
    return found


def check_parameters(found: Mapping[str, Shape], arch: Architecture, path: Path) -> None:
    """Checks the stored shapes, by the parameters' names, against a model's configuration.

    Raises:
        LowbitError: One is missing, has no place, or has another shape.
    """
    expected = shapes_of(arch)
    # Tied: one is enough, by either name.
    spare = {EMBEDDING if OUTPUT in found else OUTPUT} if arch.tied else set()
    missing = sorted(expected.keys() - found.keys() - spare)
    extra = sorted(n for n in found.keys() - expected.keys() if not n.endswith(ROTARY))
    _check_layers(found, arch, path)
    if missing:
        raise LowbitError(
            f"{path}: the weights lack {missing[0]}{_others(missing)}{_tied_hint(missing[0], arch)}"
        )
    if extra:
        raise LowbitError(
            f"{path}: {len(extra)} parameters have no place in {arch.family.model_class} as its "
            f"config describes it, the first is {extra[0]}"
        )
    for name in sorted(found.keys() & expected.keys()):
        if tuple(found[name]) != expected[name]:
            raise LowbitError(
                f"{path}: {name} has shape {tuple(found[name])}, by the config it is "
                f"{expected[name]}"
            )


def _check_layers(found: Mapping[str, Shape], arch: Architecture, path: Path) -> None:
    """Raises LowbitError where the weights have other layers than the configuration says."""
    numbers = {int(match[1]) for match in map(_LAYER.match, found) if match}
    if numbers and max(numbers) + 1 != arch.layers:
        raise LowbitError(
            f"{path}: the weights have {max(numbers) + 1} layers, the config says {arch.layers}"
        )


def _others(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _tied_hint(name: str, arch: Architecture) -> str:
    if name == OUTPUT and not arch.tied:
        return ", and the config says tie_word_embeddings=false"
    return ""


def check_rotary(name: str, table: torch.Tensor, arch: Architecture, path: Path) -> None:
    """Checks a stored rotary table, which is not used, against the configuration.

    Raises:
        LowbitError: It is that of another head size, or of another base.
    """
    powers = torch.arange(0, arch.head_dim, 2, dtype=torch.float64) / arch.head_dim
    expected = arch.rope_theta**-powers
    if table.shape != expected.shape:
        raise LowbitError(
            f"{path}: {name} has {table.numel()} frequencies, by the config there are "
            f"{expected.numel()}"
        )
    # Some were saved in fp16 or bf16; a scaled embedding has another table.
    close = torch.isclose(table.double(), expected, rtol=1e-2, atol=1e-7)
    if arch.rope_factor is None and not close.all():
        first = int((~close).nonzero()[0])
        raise LowbitError(
            f"{path}: {name} has {table[first].item():.3g} as frequency {first}, by the config "
            f"(rope_theta {arch.rope_theta}) it is {expected[first].item():.3g}"
        )
