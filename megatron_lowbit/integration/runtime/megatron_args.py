"""Megatron's arguments for inference from a checkpoint, parsed by megatron.training's own parser.

Every Megatron argument works. What is added is what inference tools need: the architecture, the
tokenizer and the tensor-parallel size come from the checkpoint, wrong input gives one line, and a
machine without CUDA gets what it can run.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import typing
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.cpu.device import enable_cpu
from megatron_lowbit.integration.rebinding import rebound
from megatron_lowbit.integration.runtime import legacy
from megatron_lowbit.integration.runtime.checkpoint import (
    ACTIVATIONS,
    check_checkpoint_dir,
    reading_checkpoint,
)
from megatron_lowbit.integration.runtime.parallel_sizes import check_parallel_sizes
from megatron_lowbit.integration.runtime.quiet import quiet
from megatron_lowbit.integration.runtime.rendezvous import check_environment

_KV_BUFFER = "inference_dynamic_batching_buffer_size_gb"

# Change the model's outputs, and are left at their defaults by Megatron's own
# load_args_from_checkpoint (0.19.2).
_RESTORED = (
    "layernorm_epsilon use_rope_scaling rope_scaling_factor kv_channels qk_layernorm qk_l2_norm "
    "layernorm_zero_centered_gamma apply_residual_connection_post_layernorm quick_geglu "
    "glu_linear_offset activation_func_clamp_value softmax_type attention_output_gate window_size "
    "window_attn_skip_freq no_rope_freq rotary_seq_len_interpolation_factor mrope_section "
    "multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim "
    "rope_type rotary_scaling_factor mscale mscale_all_dim yarn_original_max_position_embeddings "
    "yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int "
    "moe_shared_expert_gate moe_router_num_groups moe_router_group_topk moe_apply_probs_on_input "
    "use_mup mup_base_hidden_size mup_embedding_mult mup_output_mult mup_width_mult "
    "mup_attn_scale_power mup_base_head_dim gated_linear_unit activation_func "
    "experimental_attention_variant make_vocab_size_divisible_by vocab_size eos_token_ids"
).split()
# The name an argument had in checkpoints of older releases.
_OLD_NAMES = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
}


def parse_megatron_args(
    argv: list[str],
    *,
    extra_args_provider: Callable | None = None,
) -> argparse.Namespace:
    """Parses and validates Megatron's arguments for inference from a checkpoint.

    With `--load`, the architecture, tokenizer, dtype (unless `--bf16`, `--fp16` or `--fp32` is
    given) and tensor-parallel size (unless `--tensor-model-parallel-size` is given) come from the
    checkpoint; the rest of the world size becomes data parallel. Without CUDA, what a CPU cannot
    do is switched off.

    Args:
        argv: The arguments, without the program name; `sys.argv` is not looked at.
        extra_args_provider: Adds a tool's own arguments to Megatron's parser and returns it.

    Returns:
        Megatron's validated arguments.

    Raises:
        LowbitError: A checkpoint directory that is missing or empty, sizes that do not divide,
            a combination that Megatron refuses, or ranks that the environment does not make clear.
        SystemExit: 2 with one line on stderr for an argument that does not exist or parse.
    """
    check_environment()
    enable_cpu()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    require_megatron_training()
    args, given = _parse(argv, extra_args_provider)
    if getattr(args, "trust_remote_code", False):
        raise LowbitError("--trust-remote-code: no code of a model is ever run, leave it out")
    if "micro_batch_size" not in given:
        args.micro_batch_size = 1
    if args.load is not None:
        _take_from_checkpoint(args, given)
    if args.fp32:
        args.bf16 = args.fp16 = False
    fit_to_machine(args, given)
    check_parallel_sizes(args)
    _fit_vocabulary(args)
    _validate(args)
    return args


def require_megatron_training(
    remedy: str = "put a Megatron-LM checkout on PYTHONPATH",
) -> None:
    """Imports `megatron.training`, or says how to get it.

    Args:
        remedy: What else there is to do than to install a release that has it.

    Raises:
        LowbitError: It is not installed (megatron-core before 0.19 does not carry it).
    """
    if not hasattr(typing, "override"):
        # megatron.training 0.19 imports it from typing, where it lives from Python 3.12 on.
        from typing_extensions import override

        typing.override = override  # type: ignore[attr-defined]  # see above
    try:
        with quiet():
            import megatron.training.arguments
            import megatron.training.checkpointing  # noqa: F401
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("megatron"):
            raise
        raise LowbitError(
            f"{error.name} is missing: install megatron-core >= 0.19, or {remedy}"
        ) from error


def _parse(argv: list[str], extra_args_provider: Callable | None):
    """Runs Megatron's parser on `argv`; returns the arguments and the names `argv` gave."""
    from megatron.training.arguments import parse_args

    parsers = []

    def provide(parser):
        parser = extra_args_provider(parser) if extra_args_provider else parser
        parser.add_argument(
            "--fp32",
            action="store_true",
            help="Run in float32 whatever the checkpoint was saved in.",
        )
        one_line_errors(parser)
        escape_help(parser)
        parsers.append(parser)
        return parser

    with rebound(sys, argv=[sys.argv[0], *argv]):
        args = parse_args(provide)
    return args, given_names(parsers[0], argv)


def given_names(parser: argparse.ArgumentParser, argv: list[str]) -> set[str]:
    """The names of the arguments that `argv` itself gives, defaults left out."""
    names = {text: a.dest for a in parser._actions for text in a.option_strings}
    words = (word.split("=", 1)[0] for word in argv)
    return {names[word] for word in words if word in names}


def one_line_errors(parser: argparse.ArgumentParser) -> None:
    """One line instead of argparse's, which begins with a thousand lines of Megatron's usage."""

    def error(message: str) -> typing.NoReturn:
        if os.environ.get("RANK", "0") == "0":
            print(f"{parser.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)

    parser.error = error


def escape_help(parser: argparse.ArgumentParser) -> None:
    """Repairs help texts with a bare percent sign, on which `--help` would raise."""
    for action in parser._actions:
        if not action.help:
            continue
        try:
            parser._get_formatter()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")


def _take_from_checkpoint(args: argparse.Namespace, given: set[str]) -> None:
    """Sets the arguments that describe the model from the checkpoint's own."""
    from megatron.training.checkpointing import load_args_from_checkpoint

    check_checkpoint_dir(args.load)
    files = legacy.rank_files(args)
    legacy.check_files(files)
    if args.ckpt_format in ("torch", "torch_dist"):  # what is there, not what a default says
        args.ckpt_format = "torch" if files else "torch_dist"
    args.use_checkpoint_args = True
    named = named_tokenizer(args, given)
    with quiet(), reading_checkpoint(args.load):
        loaded = load_args_from_checkpoint(args)
    if not isinstance(loaded, tuple):
        raise LowbitError(f"--load {args.load}: the checkpoint carries no Megatron arguments")
    saved = loaded[1]
    for name in _RESTORED:
        value = getattr(saved, name, getattr(saved, _OLD_NAMES.get(name, name), None))
        if value is not None and name not in given:
            setattr(args, name, value)
    if isinstance(getattr(args, "activation_func", None), str):
        # Megatron's parser has no argument for it, but its model builder takes the function.
        args.activation_func = ACTIVATIONS[args.activation_func]
    if not given & {"bf16", "fp16"}:
        args.bf16, args.fp16 = getattr(saved, "bf16", False), getattr(saved, "fp16", False)
    if "tensor_model_parallel_size" not in given:
        args.tensor_model_parallel_size = getattr(saved, "tensor_model_parallel_size", 1)
    if files:
        legacy.check_sizes(files, args, saved)
    find_tokenizer(args, named)
    # Weights only, and none of them drawn at random first.
    args.no_load_optim = args.no_load_rng = args.finetune = True
    args.exit_on_missing_checkpoint = True
    args.perform_initialization = False


def named_tokenizer(args: argparse.Namespace, given: set[str]) -> dict[str, str]:
    """The tokenizer's arguments, if the command line names one; a checkpoint's replace them."""
    names = given & {"tokenizer_model", "tokenizer_type"} if "tokenizer_model" in given else ()
    return {name: getattr(args, name) for name in names}


def find_tokenizer(args: argparse.Namespace, named: dict[str, str]) -> None:
    """Sets the tokenizer once a checkpoint's arguments were taken: that of `named_tokenizer`.

    Without one it is the checkpoint's: beside it, if it was moved since it was converted.
    """
    vars(args).update(named)
    beside = Path(args.load) / "tokenizer"
    path = args.tokenizer_model
    if not named and path and not Path(path).exists() and beside.is_dir():
        args.tokenizer_model = str(beside)


def _fit_vocabulary(args: argparse.Namespace) -> None:
    """Pads the vocabulary further where the checkpoint's padding does not divide by TP.

    Megatron lets embedding and output rows past the saved ones be absent from a checkpoint.
    """
    padded, ranks = args.padded_vocab_size, args.tensor_model_parallel_size
    if padded and padded % ranks:
        multiple = args.make_vocab_size_divisible_by * ranks
        args.padded_vocab_size = -(-padded // multiple) * multiple


def fit_to_machine(args: argparse.Namespace, given: set[str]) -> None:
    """Chooses local layers unless asked otherwise, and switches off what they or a CPU lack.

    Transformer Engine's layers, which need CUDA, work too where they are asked for.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu and "transformer_impl" in given and args.transformer_impl != "local":
        raise LowbitError(f"--transformer-impl {args.transformer_impl} needs CUDA: leave it out")
    if "transformer_impl" not in given:
        args.transformer_impl = "local"
    if args.transformer_impl == "local":
        args.no_persist_layer_norm = True
        args.gradient_accumulation_fusion = False
        args.masked_softmax_fusion = False
        args.apply_rope_fusion = False
    if on_cpu:
        args.distributed_backend = "gloo"
        args.use_cpu_initialization = True
        if hasattr(args, _KV_BUFFER) and _KV_BUFFER not in given:
            setattr(args, _KV_BUFFER, 1.0)  # GB; Megatron's own default of 40 is a GPU's


def _validate(args: argparse.Namespace) -> None:
    """Runs Megatron's own checks; its assertions become errors for the user."""
    from megatron.training.arguments import validate_args

    try:
        with quiet():
            validate_args(args, {})
    except AssertionError as error:
        # Many of its assertions say nothing: then their code does.
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise LowbitError(f"Megatron refuses these arguments: {reason}") from error
