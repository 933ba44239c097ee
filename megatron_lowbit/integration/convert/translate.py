"""A model in Megatron's terms: its arguments, and its parameters by Megatron's names."""

from __future__ import annotations

import argparse
import math
import os
import shlex
from pathlib import Path

import torch

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.convert.families import Architecture
from megatron_lowbit.integration.convert.weights import Weights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VOCAB_MULTIPLE = 128  # Megatron's default for --make-vocab-size-divisible-by


def layer_weights(
    get: Weights, arch: Architecture, layer: int, *, hybrid: bool = False
) -> dict[str, torch.Tensor]:
    """Megatron's parameters of one transformer layer, which is two layers of a HybridModel.

    Megatron stores `linear_qkv` by query group, `[q of the group | k | v]`, and `linear_fc1` as
    `[gate | up]`, so that an even split of the rows is a tensor-parallel split.
    """
    source = f"model.layers.{layer}."
    first, second = (2 * layer, 2 * layer + 1) if hybrid else (layer, layer)
    attention_layer, mlp_layer = f"decoder.layers.{first}.", f"decoder.layers.{second}."
    attention = f"{attention_layer}self_attention."

    def qkv(kind: str) -> torch.Tensor:
        parts = [get(f"{source}self_attn.{name}_proj.{kind}") for name in "qkv"]
        groups = [part.reshape(arch.kv_heads, -1, *part.shape[1:]) for part in parts]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def norm(name: str) -> torch.Tensor:
        return _norm(get, arch, f"{source}{name}.weight")

    gate_up = [get(f"{source}mlp.{name}_proj.weight") for name in ("gate", "up")]
    weights = {
        f"{attention_layer}input_layernorm.weight": norm("input_layernorm"),
        f"{attention}linear_qkv.weight": qkv("weight"),
        f"{attention}linear_proj.weight": get(f"{source}self_attn.o_proj.weight"),
        f"{mlp_layer}pre_mlp_layernorm.weight": norm("post_attention_layernorm"),
        f"{mlp_layer}mlp.linear_fc1.weight": torch.cat(gate_up),
        f"{mlp_layer}mlp.linear_fc2.weight": get(f"{source}mlp.down_proj.weight"),
    }
    if arch.family.qkv_bias:
        weights[f"{attention}linear_qkv.bias"] = qkv("bias")
    if arch.family.qk_norm:
        weights[f"{attention}q_layernorm.weight"] = norm("self_attn.q_norm")
        weights[f"{attention}k_layernorm.weight"] = norm("self_attn.k_norm")
    return weights


def outer_weights(
    get: Weights, arch: Architecture, *, hybrid: bool = False
) -> dict[str, torch.Tensor]:
    """Megatron's parameters outside the layers, before padding."""
    final_norm = "decoder.final_norm" if hybrid else "decoder.final_layernorm"
    weights = {
        "embedding.word_embeddings.weight": get("model.embed_tokens.weight"),
        f"{final_norm}.weight": _norm(get, arch, "model.norm.weight"),
    }
    if not arch.tied:
        weights["output_layer.weight"] = get("lm_head.weight")
    return weights


def _norm(get: Weights, arch: Architecture, name: str) -> torch.Tensor:
    """A norm's weight, with what the family adds to it.

    Megatron could add it itself (`layernorm_zero_centered_gamma`), but its local layers' norms
    refuse to. In bf16 this rounds `1 + weight`, which on a tiny model added 8 % to the error that
    bf16 arithmetic has anyway.
    """
    weight = get(name)
    return weight.float() + arch.family.norm_offset if arch.family.norm_offset else weight


def megatron_args(
    arch: Architecture, *, ranks: int, dtype: str, tokenizer: Path, hybrid: bool = False
) -> argparse.Namespace:
    """Megatron's arguments for the model, as `--use-checkpoint-args` reads them.

    Raises:
        LowbitError: A HybridModel cannot be so.
    """
    multiple = VOCAB_MULTIPLE * ranks
    return argparse.Namespace(
        **_layer_args(arch, hybrid),
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.ffn,
        num_attention_heads=arch.heads,
        group_query_attention=arch.kv_heads != arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        seq_length=arch.max_positions,
        max_position_embeddings=arch.max_positions,
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=True,
        rotary_base=arch.rope_theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=arch.rope_factor is not None,
        rope_scaling_factor=arch.rope_factor or 8.0,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_epsilon,
        norm_epsilon=arch.norm_epsilon,  # its name before megatron-core 0.17
        apply_layernorm_1p=False,
        layernorm_zero_centered_gamma=False,
        squared_relu=False,
        add_bias_linear=False,
        add_qkv_bias=arch.family.qkv_bias,
        qk_layernorm=arch.family.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        apply_query_key_layer_scaling=False,
        untie_embeddings_and_output_weights=not arch.tied,
        vocab_size=arch.vocab,
        make_vocab_size_divisible_by=VOCAB_MULTIPLE,
        padded_vocab_size=-(-arch.vocab // multiple) * multiple,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tokenizer),
        eos_token_ids=list(arch.stops) or None,
        tensor_model_parallel_size=ranks,
        pipeline_model_parallel_size=1,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        params_dtype=DTYPES[dtype],
        ckpt_format="torch_dist",
        iteration=0,
        **_window_args(arch),
        **_activation_args(arch),
        **_embedding_args(arch, dtype),
    )


def _layer_args(arch: Architecture, hybrid: bool) -> dict:
    """Layers of a GPTModel, or of a HybridModel: attention and MLP in turn."""
    if not hybrid:
        return {"num_layers": arch.layers}
    windows = sum(arch.windowed)
    if windows not in (0, arch.layers):
        raise LowbitError(
            f"--hybrid: {windows} of {arch.layers} layers have a sliding window, which Megatron's "
            "HybridModel has in all layers or in none: convert without --hybrid"
        )
    if arch.rope_factor is not None:
        raise LowbitError(
            f"--hybrid: Llama-3 rope scaling (factor {arch.rope_factor}), which Megatron's "
            "HybridModel does not have: convert without --hybrid"
        )
    pattern = "*-" * arch.layers
    return {"num_layers": len(pattern), "hybrid_layer_pattern": pattern, "is_hybrid_model": True}


def _window_args(arch: Architecture) -> dict:
    """Megatron counts a window to the left without the token itself, transformers with it."""
    if arch.window is None:
        return {"window_size": None, "window_attn_skip_freq": None}
    some = None if all(arch.windowed) else [int(has) for has in arch.windowed]
    return {"window_size": (arch.window - 1, 0), "window_attn_skip_freq": some}


def _activation_args(arch: Architecture) -> dict:
    """SwiGLU has a Megatron argument; another gated unit's name is for `megatron_args` to read."""
    if arch.family.activation == "silu":
        return {"swiglu": True}
    return {
        "swiglu": False,
        "gated_linear_unit": True,
        "activation_func": arch.family.activation,
    }


def _embedding_args(arch: Architecture, dtype: str) -> dict:
    """The embeddings' factor, as MuP's for a model of base width, where MuP scales nothing else.

    transformers rounds the factor to the weights' dtype, and so were the models trained.
    """
    if not arch.family.scaled_embedding:
        return {"use_mup": False}
    return {
        "use_mup": True,
        "mup_base_hidden_size": arch.hidden,
        "mup_embedding_mult": torch.tensor(math.sqrt(arch.hidden), dtype=DTYPES[dtype]).item(),
        "mup_output_mult": 1.0,
        "mup_attn_scale_power": 0.5,
    }


def load_flags(args: argparse.Namespace, save: str | os.PathLike) -> str:
    """The arguments that load the checkpoint in Megatron's own scripts, for a user to copy."""
    flags = ["--load", str(save), "--use-checkpoint-args", "--ckpt-format", "torch_dist"]
    flags += ["--tensor-model-parallel-size", str(args.tensor_model_parallel_size)]
    flags += ["--norm-epsilon", str(args.layernorm_epsilon)]
    if args.use_rope_scaling:
        flags += ["--use-rope-scaling", "--rope-scaling-factor", str(args.rope_scaling_factor)]
    if args.qk_layernorm:
        flags += ["--qk-layernorm"]
    if args.window_size:
        flags += ["--window-size", ",".join(map(str, args.window_size))]
    if args.window_attn_skip_freq:
        flags += ["--window-attn-skip-freq", str(args.window_attn_skip_freq).replace(" ", "")]
    flags += [name for name in ("--bf16", "--fp16") if getattr(args, name[2:])]
    return shlex.join(flags)


def unsayable(args: argparse.Namespace) -> str | None:
    """What of the model Megatron's own command line has no argument for, or None."""
    return None if args.swiglu else "GeGLU, its gated activation"
