"""The model families that conversion knows: what each one's configuration means to Megatron.

A family is one entry of `FAMILIES`. `Architecture.of` reads a transformers configuration by it and
refuses, by name, every setting that it does not know how to express in Megatron's GPTModel.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.convert.config_numbers import (
    check_whole,
    epsilon,
    real,
    token_ids,
)
from megatron_lowbit.integration.runtime.checkpoint import ACTIVATIONS

# Megatron's rotary embedding has these Llama-3 constants in its code; only the factor is free.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", *_LLAMA3_ROPE}

# The settings that are read for every family. transformers before 5 had the rotary embedding's in
# rope_theta and rope_scaling.
_READ = frozenset(
    "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads "
    "head_dim vocab_size max_position_embeddings rms_norm_eps hidden_act tie_word_embeddings "
    "rope_parameters rope_theta rope_scaling".split()
)
# Settings that change no logits in inference: training, bookkeeping, text in and out.
_NEUTRAL = frozenset(
    "initializer_range attention_dropout use_cache pretraining_tp dtype torch_dtype architectures "
    "model_type transformers_version _name_or_path _model_name_or_path _attn_implementation "
    "tokenizer_class bos_token_id eos_token_id pad_token_id is_llama_config "
    "transformers.js_config".split()
)
# Model types that people will try, and why Megatron-core's GPTModel cannot be them.
_IMPOSSIBLE = dict.fromkeys(
    ("gemma2", "gemma3", "gemma3_text"),
    "Megatron-core's layers have no norms behind attention and MLP and no soft-capped logits",
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets a family apart from Llama.

    Attributes:
        model_class: transformers' name of it.
        settings: What is read from its configuration beside what is read from all.
        activation: A key of `ACTIVATIONS`.
        qkv_bias: Query, key and value have biases; nothing else has.
        qk_norm: Every head's query and key are normalized.
        norm_offset: Added to the weight of every norm.
        scaled_embedding: Embeddings are multiplied by the square root of the hidden size.
        gguf: Its GGUF files can be read, too.
    """

    model_class: str
    settings: frozenset[str] = frozenset()
    activation: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    gguf: bool = False


_QWEN_WINDOWS = frozenset("use_sliding_window sliding_window max_window_layers layer_types".split())
# By transformers' model_type.
FAMILIES = {
    "llama": Family(model_class="LlamaForCausalLM", gguf=True),
    "mistral": Family(model_class="MistralForCausalLM", settings=frozenset({"sliding_window"})),
    "qwen2": Family(model_class="Qwen2ForCausalLM", settings=_QWEN_WINDOWS, qkv_bias=True),
    "qwen3": Family(model_class="Qwen3ForCausalLM", settings=_QWEN_WINDOWS, qk_norm=True),
    "gemma": Family(
        model_class="GemmaForCausalLM",
        # Its first name for hidden_act, which transformers no longer reads.
        settings=frozenset({"hidden_activation"}),
        activation="gelu_pytorch_tanh",
        norm_offset=1.0,
        scaled_embedding=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What Megatron has to know about a model; sizes in features, heads or tokens.

    Attributes:
        window: Keys that a token attends to in layers with a sliding window, itself included, or
            None where no layer has one.
        windowed: For every layer, whether it has one.
        stops: The tokens that end a text; none where the model does not say.
    """

    family: Family
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
    window: int | None
    windowed: tuple[bool, ...]
    stops: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Any, *, stops: Any = None) -> Architecture:
        """Reads a transformers configuration.

        Args:
            config: The configuration.
            stops: The `eos_token_id` that its file says; transformers fills in one that it does
                not say.

        Raises:
            LowbitError: Megatron's GPTModel cannot be this model, or a setting is not understood
                or out of range.
        """
        family = _family(config)
        _refuse_unknown(config, family)
        check_whole(lambda name: getattr(config, name, None))
        theta, factor = _rope(config)
        window, windowed = _windows(config)
        heads = config.num_attention_heads
        made = cls(
            family=family,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab=config.vocab_size,
            max_positions=config.max_position_embeddings,
            # GGUF keeps it in fp32: 1e-5 comes back as 9.999999747378752e-06.
            norm_epsilon=float(f"{epsilon(config.rms_norm_eps):.7g}"),
            rope_theta=theta,
            rope_factor=factor,
            tied=config.tie_word_embeddings,
            window=window,
            windowed=windowed,
            stops=token_ids(stops, config.vocab_size),
        )
        made.check_heads()
        return made

    def check_heads(self) -> None:
        """Raises LowbitError where the heads are not what attention can work with."""
        if self.heads % self.kv_heads:
            raise LowbitError(
                f"num_attention_heads {self.heads} is not supported with num_key_value_heads "
                f"{self.kv_heads}, which does not divide it"
            )
        if self.head_dim % 2:
            raise LowbitError(
                f"head_dim {self.head_dim} is not supported: rotary embeddings turn pairs"
            )

    def check_tensor_parallel(self, ranks: int) -> None:
        """Raises LowbitError where `ranks` does not divide the heads, KV heads or FFN."""
        if self._divides(ranks):
            return
        allowed = ", ".join(str(n) for n in range(1, self.heads + 1) if self._divides(n))
        raise LowbitError(
            f"tensor parallel size {ranks} does not divide {self.heads} heads, "
            f"{self.kv_heads} KV heads and {self.ffn} FFN features; allowed: {allowed}"
        )

    def _divides(self, ranks: int) -> bool:
        """Whether Megatron can split the model so; it copies KV heads that are fewer than ranks."""
        if ranks < 1 or math.gcd(self.heads, self.ffn) % ranks:
            return False
        qkv_rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        copied = ranks % self.kv_heads == 0 and qkv_rows % ranks == 0
        return self.kv_heads % ranks == 0 or copied


def _family(config: Any) -> Family:
    """The family of a configuration, or a LowbitError that says which there are."""
    kind = config.model_type
    if kind in FAMILIES:
        return FAMILIES[kind]
    named = getattr(config, "architectures", None)
    name = named[0] if isinstance(named, list) and named else f"model type {kind}"
    if kind in _IMPOSSIBLE:
        raise LowbitError(f"{name} is not supported: {_IMPOSSIBLE[kind]}")
    known = ", ".join(family.model_class for family in FAMILIES.values())
    raise LowbitError(
        f"{name} is not supported, these are: {known}; megatron-bridge, which needs GPUs and "
        "Transformer Engine, converts more into the same torch_dist format"
    )


def _refuse_unknown(config: Any, family: Family) -> None:
    """Raises LowbitError naming the first setting of `config` that may change the logits unseen.

    That is whatever is neither read nor known to be neutral, unless it is switched off or what
    transformers takes where nothing is said.
    """
    if config.hidden_act not in ACTIVATIONS or config.hidden_act != family.activation:
        raise LowbitError(
            f"activation {config.hidden_act!r} is not supported, "
            f"only {family.activation!r} is in {family.model_class}"
        )
    default = type(config)().to_dict()
    for name, value in config.to_dict().items():
        if name in _READ | _NEUTRAL | family.settings or not value or value == default.get(name):
            continue
        raise LowbitError(
            f"{name}={reprlib.repr(value)} is not supported in {family.model_class}; "
            "if it changes no logits, take it out of config.json"
        )


def _rope(config: Any) -> tuple[int, float | None]:
    """The rotary base, and the Llama-3 scaling factor or None."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    # transformers before 5 keeps the base beside the scaling instead of in it.
    rope = rope or dict(getattr(config, "rope_scaling", None) or {})
    for name in rope.keys() - _ROPE:
        if rope[name]:  # transformers would leave it out
            raise LowbitError(f"rope parameter {name}={reprlib.repr(rope[name])} is not supported")
    given = rope.get("rope_theta", getattr(config, "rope_theta", None))
    theta = real(10000.0 if given is None else given, "rope_theta", 1, 1e15)
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
    return int(theta), float(real(rope.get("factor"), "rope scaling factor", 1, 1e6))


def _windows(config: Any) -> tuple[int | None, tuple[bool, ...]]:
    """The sliding window and the layers that have it; see `Architecture`."""
    window: Any = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    kinds = kinds or ["sliding_attention"] * config.num_hidden_layers
    foreign = set(kinds) - {"sliding_attention", "full_attention"}
    if foreign:
        raise LowbitError(f"layer_types with {min(foreign)!r} is not supported")
    if len(kinds) != config.num_hidden_layers:
        raise LowbitError(
            f"layer_types of {len(kinds)} layers is not supported with num_hidden_layers "
            f"{config.num_hidden_layers}"
        )
    windowed = tuple(window is not None and kind == "sliding_attention" for kind in kinds)
    return (window if any(windowed) else None), windowed
