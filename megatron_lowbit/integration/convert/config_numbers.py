"""The numbers of a model's configuration: of the right type, and what a model can have."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from typing import Any

from megatron_lowbit.errors import LowbitError

# The least and the most of each. The largest models have 2**17 positions more or less, 200 layers,
# 2**15 features, 2**20 tokens: more than this is damage, and takes hours of building lists.
_WHOLE = {
    "num_hidden_layers": (1, 10_000),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**24),
    "num_attention_heads": (1, 2**16),
    "num_key_value_heads": (1, 2**16),
    "head_dim": (2, 2**16),
    "vocab_size": (1, 2**26),
    "max_position_embeddings": (1, 2**31),
    "sliding_window": (1, 2**31),
    "max_window_layers": (0, 10_000),
}
_MAY_BE_NULL = {"num_key_value_heads", "head_dim", "sliding_window", "max_window_layers"}
_TYPES: dict[str, type] = {"tie_word_embeddings": bool, "model_type": str, "hidden_act": str}
_KINDS = {bool: "true or false", str: "a text"}
# The same in GGUF's terms, where counting goes on before transformers has read them.
_GGUF = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
_GGUF_OPTIONAL = {"attention.head_count_kv", "vocab_size"}


def whole(value: Any, name: str, low: int, high: int) -> int:
    """`value`, if it is a whole number from `low` to `high`; no boolean, no float, no text.

    Raises:
        LowbitError: It is not.
    """
    if type(value) is not int or not low <= value <= high:
        raise LowbitError(
            f"{name} {reprlib.repr(value)} is not supported: give a whole number from {low} "
            f"to {high}"
        )
    return value


def real(value: Any, name: str, low: float, high: float) -> float:
    """`value`, if it is a number from `low` to `high`; see `whole`."""
    if type(value) not in (int, float) or not low <= value <= high:  # no NaN is
        raise LowbitError(
            f"{name} {reprlib.repr(value)} is not supported: give a number from {low} to {high}"
        )
    return value


def epsilon(value: Any) -> float:
    """`rms_norm_eps`; see `whole`."""
    return real(value, "rms_norm_eps", math.ulp(0.0), 1.0)


def check_whole(get: Callable[[str], Any]) -> None:
    """Checks every whole number that `get` gives by its name; None is one that is not said.

    Raises:
        LowbitError: One has another type, or is out of range.
    """
    for name, (low, high) in _WHOLE.items():
        if (value := get(name)) is not None:
            whole(value, name, low, high)


def check_raw(config: dict[str, Any]) -> None:
    """Checks what a config.json says, before transformers makes lists of so many layers.

    Raises:
        LowbitError: See `check_whole`; or another setting has a type that it cannot have.
    """
    check_whole(config.get)
    for name in _WHOLE.keys() - _MAY_BE_NULL:
        if name in config and config[name] is None:
            raise LowbitError(f"{name} null is not supported: give a whole number")
    epsilon(config.get("rms_norm_eps", 1e-5))
    token_ids(config.get("eos_token_id"), _WHOLE["vocab_size"][1])
    for name, kind in _TYPES.items():
        if not isinstance(config.get(name, kind()), kind):
            raise LowbitError(
                f"{name} {reprlib.repr(config[name])} is not supported: give {_KINDS[kind]}"
            )


def check_gguf(get: Callable[[str], Any]) -> None:
    """Checks a GGUF file's metadata in the same way; `get` leaves out the architecture's name.

    Raises:
        LowbitError: A number is out of range, or the rotary embedding is scaled.
    """
    for name, known in _GGUF.items():
        if (value := get(name)) is not None:
            whole(value, name, *_WHOLE[known])
    kind = get("rope.scaling.type")
    if kind not in (None, "none"):
        raise LowbitError(
            f"rope scaling {kind!r} is not read from GGUF files: convert from the Hugging Face "
            "directory"
        )


def check_gguf_complete(get: Callable[[str], Any]) -> None:
    """Checks that a Llama's GGUF file says all that transformers would make up.

    Raises:
        LowbitError: It does not.
    """
    for name in _GGUF.keys() - _GGUF_OPTIONAL:
        whole(get(name), name, *_WHOLE[_GGUF[name]])
    epsilon(get("attention.layer_norm_rms_epsilon"))


def token_ids(value: Any, vocab: int) -> tuple[int, ...]:
    """The tokens of an `eos_token_id`, which is a number, a list of them, or None.

    Raises:
        LowbitError: One is no token of the vocabulary.
    """
    listed = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(whole(one, "eos_token_id", 0, vocab - 1) for one in listed))
