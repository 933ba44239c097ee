"""Starting Megatron and getting a model out of a checkpoint, the same way for every tool.

Everything goes through `megatron.training`: its argument parser, its model builder and its
checkpoint loader, so every Megatron argument and every torch_dist checkpoint works. What is added
is what inference tools need: the architecture comes from the checkpoint, the output is quiet, wrong
input gives one line, and a machine without CUDA works (Gloo).

    args = parse_megatron_args(argv)
    initialize(args)
    model, tokenizer = load_model(args), build_tokenizer(args)
    ...
    shutdown()

Set MEGATRON_LOWBIT_VERBOSE=1 to see what Megatron prints.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.cpu import enable_cpu

_rendezvous: dict[str, Any] = {}

TRACKER = "latest_checkpointed_iteration.txt"

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
    "use_mup mup_embedding_mult mup_output_mult mup_width_mult mup_attn_scale_power "
    "experimental_attention_variant make_vocab_size_divisible_by vocab_size"
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
    defaults: dict[str, Any] | None = None,
) -> argparse.Namespace:
    """Parses and validates Megatron's arguments for inference from a checkpoint.

    With `--load`, the architecture, tokenizer, dtype (unless `--bf16`, `--fp16` or `--fp32` is
    given) and tensor-parallel size (unless `--tensor-model-parallel-size` is given) come from the
    checkpoint; the rest of the world size becomes data parallel. Without CUDA, what a CPU cannot
    do is switched off.

    Args:
        argv: The arguments, without the program name; `sys.argv` is not looked at.
        extra_args_provider: Adds a tool's own arguments to Megatron's parser and returns it.
        defaults: Values by argument name (`micro_batch_size`) for what is not in `argv`. The
            checkpoint's architecture goes before them.

    Returns:
        Megatron's validated arguments.

    Raises:
        LowbitError: A checkpoint directory that is missing or empty, sizes that do not divide, or
            a combination that Megatron refuses.
        SystemExit: 2 with one line on stderr for an argument that does not exist or parse.
    """
    enable_cpu()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    require_megatron_training()
    args, given = _parse(argv, extra_args_provider)
    for name, value in {"micro_batch_size": 1, **(defaults or {})}.items():
        if name not in given:
            setattr(args, name, value)
    if args.load is not None:
        _take_from_checkpoint(args, given)
    if args.fp32:
        args.bf16 = args.fp16 = False
    if not torch.cuda.is_available():
        _fit_to_cpu(args)
    check_parallel_sizes(args)
    _validate(args)
    return args


def require_megatron_training() -> None:
    """Imports `megatron.training`, or says how to get it.

    Raises:
        LowbitError: It is not installed (megatron-core before 0.19 does not carry it).
    """
    if not hasattr(typing, "override"):
        # megatron.training 0.19 imports it from typing, where it lives from Python 3.12 on.
        from typing_extensions import override

        typing.override = override
    try:
        with quiet():
            import megatron.training.arguments
            import megatron.training.checkpointing
            import megatron.training.models  # noqa: F401
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("megatron"):
            raise
        raise LowbitError(
            f"{error.name} is missing: install megatron-core >= 0.19, or put a Megatron-LM "
            "checkout on PYTHONPATH"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what Megatron prints, logs and warns, unless MEGATRON_LOWBIT_VERBOSE=1.

    Errors still come out as exceptions. Log handlers that Megatron installs meanwhile are removed.
    """
    if os.environ.get("MEGATRON_LOWBIT_VERBOSE") == "1":
        yield
        return
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:], root.level = handlers, level
        logging.disable(disabled)


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
        parser.error = lambda message: _usage_error(parser, message)
        _escape_help(parser)
        parsers.append(parser)
        return parser

    program, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        args = parse_args(provide)
    finally:
        sys.argv = program
    names = {text: a.dest for a in parsers[0]._actions for text in a.option_strings}
    words = (word.split("=", 1)[0] for word in argv)
    return args, {names[word] for word in words if word in names}


def _usage_error(parser: argparse.ArgumentParser, message: str) -> typing.NoReturn:
    """One line instead of argparse's, which begins with a thousand lines of Megatron's usage."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _escape_help(parser: argparse.ArgumentParser) -> None:
    """Repairs help texts with a bare percent sign, on which `--help` would raise."""
    for action in parser._actions:
        try:
            parser._get_formatter()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")


def _take_from_checkpoint(args: argparse.Namespace, given: set[str]) -> None:
    """Sets the arguments that describe the model from the checkpoint's own."""
    from megatron.training.checkpointing import load_args_from_checkpoint

    check_checkpoint_dir(args.load)
    args.use_checkpoint_args = True
    if "tokenizer_model" in given:
        args.use_tokenizer_model_from_checkpoint_args = False
    with quiet():
        loaded = load_args_from_checkpoint(args)
    if not isinstance(loaded, tuple):
        raise LowbitError(f"--load {args.load}: the checkpoint carries no Megatron arguments")
    saved = loaded[1]
    for name in _RESTORED:
        value = getattr(saved, name, getattr(saved, _OLD_NAMES.get(name, name), None))
        if value is not None and name not in given:
            setattr(args, name, value)
    if not given & {"bf16", "fp16"}:
        args.bf16, args.fp16 = getattr(saved, "bf16", False), getattr(saved, "fp16", False)
    if "tensor_model_parallel_size" not in given:
        args.tensor_model_parallel_size = getattr(saved, "tensor_model_parallel_size", 1)
    _fit_vocabulary(args)
    beside = Path(args.load) / "tokenizer"
    if args.tokenizer_model and not Path(args.tokenizer_model).exists() and beside.is_dir():
        args.tokenizer_model = str(beside)  # the checkpoint was moved since it was converted
    # Weights only, and none of them drawn at random first.
    args.no_load_optim = args.no_load_rng = args.finetune = True
    args.exit_on_missing_checkpoint = True
    args.perform_initialization = False


def _fit_vocabulary(args: argparse.Namespace) -> None:
    """Pads the vocabulary further where the checkpoint's padding does not divide by TP.

    Megatron lets embedding and output rows past the saved ones be absent from a checkpoint.
    """
    padded, ranks = args.padded_vocab_size, args.tensor_model_parallel_size
    if padded and padded % ranks:
        multiple = args.make_vocab_size_divisible_by * ranks
        args.padded_vocab_size = -(-padded // multiple) * multiple


def check_checkpoint_dir(load: str) -> None:
    """Raises LowbitError unless `load` is a directory that holds a complete checkpoint."""
    if not Path(load).is_dir():
        raise LowbitError(f"--load {load}: no such directory")
    if not (Path(load) / TRACKER).is_file():
        raise LowbitError(f"--load {load}: not a Megatron checkpoint, it has no {TRACKER}")


def check_parallel_sizes(args: argparse.Namespace) -> None:
    """Raises LowbitError where the world size or the model does not divide by its parallel size."""
    ranks = args.tensor_model_parallel_size
    stages, context = args.pipeline_model_parallel_size, args.context_parallel_size
    product = ranks * stages * context
    if args.world_size % product:
        raise LowbitError(
            f"world size {args.world_size} is not divisible by {product} (tensor parallel {ranks} "
            f"x pipeline {stages} x context {context}): start {product} processes, or pass "
            "--tensor-model-parallel-size"
        )
    groups = args.num_query_groups if args.group_query_attention else None
    for what, count in (("attention heads", args.num_attention_heads), ("query groups", groups)):
        # Megatron duplicates KV heads where there are fewer of them than ranks.
        if count and count % ranks and not (what == "query groups" and ranks % count == 0):
            raise LowbitError(f"tensor parallel size {ranks} does not divide {count} {what}")


def _fit_to_cpu(args: argparse.Namespace) -> None:
    """Switches off what needs CUDA."""
    args.distributed_backend = "gloo"
    args.transformer_impl = "local"
    args.use_cpu_initialization = True
    args.no_persist_layer_norm = True
    args.gradient_accumulation_fusion = False
    args.masked_softmax_fusion = False
    args.apply_rope_fusion = False


def _validate(args: argparse.Namespace) -> None:
    """Runs Megatron's own checks; its assertions become errors for the user."""
    from megatron.training.arguments import validate_args

    try:
        with quiet():
            validate_args(args, {})
    except AssertionError as error:
        raise LowbitError(f"Megatron refuses these arguments: {error}") from error


def initialize(args: argparse.Namespace) -> None:
    """Starts the process group, model parallelism and random number generators for `args`.

    Under torchrun it joins its processes; without torchrun it is a group of one. Megatron's
    dataset helpers are not compiled.
    """
    from megatron.training import initialize as training
    from megatron.training.global_vars import set_global_variables

    compile_dependencies = training._compile_dependencies
    training._compile_dependencies = lambda: None
    try:
        with quiet():
            set_global_variables(args, build_tokenizer=False)
            store = None if torch.distributed.is_initialized() else _fresh_store(args)
            # Without a device Megatron leaves these to us, and wants them before it seeds.
            if not torch.cuda.is_available():
                _initialize_cpu_parallel(args, store)
            training.initialize_megatron(allow_no_cuda=True, store=store)
    finally:
        training._compile_dependencies = compile_dependencies


def _fresh_store(args: argparse.Namespace) -> torch.distributed.Store:
    """A store for the process group: torchrun's, or one of our own for a single process.

    The key prefix counts the initializations of this process: Gloo would find the addresses of the
    group before, and fail to connect, where `initialize` follows `shutdown`.
    """
    if "store" not in _rendezvous:
        if "MASTER_ADDR" in os.environ:
            minutes = timedelta(minutes=args.distributed_timeout_minutes)
            _rendezvous["store"] = next(torch.distributed.rendezvous("env://", timeout=minutes))[0]
        else:
            _rendezvous["store"] = torch.distributed.HashStore()
    _rendezvous["count"] = _rendezvous.get("count", 0) + 1
    return torch.distributed.PrefixStore(f"megatron{_rendezvous['count']}", _rendezvous["store"])


def _initialize_cpu_parallel(args: argparse.Namespace, store) -> None:
    """Process group, model-parallel groups and the RNG tracker."""
    from megatron.core import parallel_state, tensor_parallel

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            args.distributed_backend,
            store=store,
            rank=args.rank,
            world_size=args.world_size,
            timeout=timedelta(minutes=args.distributed_timeout_minutes),
        )
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    # The inference tracker keeps no CUDA generator states.
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed, inference_rng_tracker=True)


def load_model(args: argparse.Namespace) -> torch.nn.Module:
    """Builds the model of `args` and loads the checkpoint `args.load` into it.

    Args:
        args: From `parse_megatron_args`, after `initialize`.

    Returns:
        This rank's part of the model in eval mode, in `args.params_dtype`, on the GPU or CPU. As
        Megatron's own tools do it: wrapped in `Float16Module` for bf16 and fp16 (it turns logits
        into fp32), a bare `GPTModel` for fp32; `megatron.core.utils.unwrap_model` takes the wrapper
        off. Random weights where `args.load` is None.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.checkpointing import load_checkpoint

    with quiet():
        groups = ProcessGroupCollection.use_mpu_process_groups()
        chunks = _builder(args).build_distributed_models(pg_collection=groups, wrap_with_ddp=False)
        if args.load is not None:
            load_checkpoint(chunks, None, None)
    if len(chunks) != 1:
        raise LowbitError(f"virtual pipeline of {len(chunks)} stages: inference needs one")
    return chunks[0].eval()


def _builder(args: argparse.Namespace):
    """The megatron.training model builder for `args`."""
    from megatron.training import argument_utils, models

    if getattr(args, "hybrid_layer_pattern", None):
        return models.HybridModelBuilder(argument_utils.hybrid_config_from_args(args))
    config = argument_utils.gpt_config_from_args(args)
    # gpt_config_from_args (0.19.2) forgets it and leaves 8, which is wrong for Llama 3.2 (32).
    config.rope_scaling_factor = args.rope_scaling_factor
    return models.GPTModelBuilder(config)


def build_tokenizer(args: argparse.Namespace):
    """Megatron's own tokenizer for `args`: by default the one the checkpoint names.

    Raises:
        LowbitError: No tokenizer is named, or its path does not exist.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as build

    if args.tokenizer_type is None:
        raise LowbitError("no tokenizer: pass --tokenizer-type and --tokenizer-model")
    if args.tokenizer_type == "HuggingFaceTokenizer" and os.sep in str(args.tokenizer_model):
        if not Path(args.tokenizer_model).exists():
            raise LowbitError(f"--tokenizer-model {args.tokenizer_model}: no such directory")
    with quiet():
        return build(args)


def shutdown() -> None:
    """Ends the process group and forgets Megatron's global state; `initialize` may follow."""
    from megatron.core import parallel_state
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import unset_global_variables

    with quiet():
        parallel_state.destroy_model_parallel()
        destroy_rerun_state_machine()
        unset_global_variables()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
