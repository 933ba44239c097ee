"""Starting Megatron and getting a model out of a checkpoint, the same way for every tool.

Everything goes through `megatron.training`: its argument parser (`megatron_args`), its model
builder and its checkpoint loader, so every Megatron argument and every torch_dist checkpoint works,
on a machine without CUDA too (Gloo).

    args = megatron_args.parse_megatron_args(argv)
    initialize(args)
    model, tokenizer = load_model(args), build_tokenizer(args)
    ...
    shutdown()
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.cpu.training import initialize_cpu_parallel
from megatron_lowbit.integration.rebinding import rebound
from megatron_lowbit.integration.runtime import legacy
from megatron_lowbit.integration.runtime.checkpoint import reading_checkpoint
from megatron_lowbit.integration.runtime.hybrid import local_final_norm, local_stack_spec
from megatron_lowbit.integration.runtime.model_files import (
    last_token,
    one_line_errors,
    refuse_own_code,
)
from megatron_lowbit.integration.runtime.pipeline import stages_of, whole_model
from megatron_lowbit.integration.runtime.quiet import quiet
from megatron_lowbit.integration.runtime.rendezvous import muster
from megatron_lowbit.model.forward import logits
from megatron_lowbit.model.language_model import LanguageModel

_rendezvous: dict[str, Any] = {}


def initialize(args: argparse.Namespace) -> None:
    """Starts the process group, model parallelism and random number generators for `args`.

    Under torchrun it joins its processes; without torchrun it is a group of one. Megatron's
    dataset helpers are not compiled.
    """
    from megatron.training import initialize as training
    from megatron.training.global_vars import set_global_variables

    muster()
    with rebound(training, _compile_dependencies=lambda: None), quiet():
        set_global_variables(args, build_tokenizer=False)
        store = None if torch.distributed.is_initialized() else _fresh_store(args)
        # Without a device Megatron leaves these to us, and wants them before it seeds.
        if not torch.cuda.is_available():
            initialize_cpu_parallel(args, store)
        training.initialize_megatron(allow_no_cuda=True, store=store)


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


def load_model(args: argparse.Namespace) -> torch.nn.Module:
    """Builds the model of `args` and loads the checkpoint `args.load` into it.

    Raises:
        LowbitError: The checkpoint's files are damaged or not all there.

    Returns:
        This rank's part of the model in eval mode, in `args.params_dtype`, on the GPU or CPU. As
        Megatron's own tools do it: wrapped in `Float16Module` for bf16 and fp16 (it turns logits
        into fp32), a bare `GPTModel` or `HybridModel` for fp32; `megatron.core.utils.unwrap_model`
        takes the wrapper off. Random weights where `args.load` is None.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import unwrap_model
    from megatron.training.checkpointing import load_checkpoint

    with quiet(), local_final_norm():
        groups = ProcessGroupCollection.use_mpu_process_groups()
        chunks = _builder(args).build_distributed_models(pg_collection=groups, wrap_with_ddp=False)
        if len(chunks) != 1:
            raise LowbitError(f"virtual pipeline of {len(chunks)} stages: inference needs one")
        if args.load is not None:
            is_legacy = bool(legacy.rank_files(args))
            whole = legacy.whole(unwrap_model(chunks[0]), args.load) if is_legacy else nullcontext()
            with reading_checkpoint(args.load), whole:
                load_checkpoint(chunks, None, None)
    return chunks[0].eval()


def load_whole_model(args: argparse.Namespace) -> nn.Module:
    """As `load_model`; of a pipeline the stages as one model (`pipeline.whole_model`)."""
    vocabulary = args.padded_vocab_size // args.tensor_model_parallel_size
    return whole_model(load_model(args), vocabulary)


def _builder(args: argparse.Namespace):
    """The megatron.training model builder for `args`."""
    from megatron.training import argument_utils, models

    if getattr(args, "hybrid_layer_pattern", None):
        config = argument_utils.hybrid_config_from_args(args)
        if args.transformer_impl == "local" and config.hybrid_stack_spec is None:
            config.hybrid_stack_spec = local_stack_spec(
                config.transformer, args.hybrid_layer_pattern
            )
        return models.HybridModelBuilder(config)
    config = argument_utils.gpt_config_from_args(args)
    # gpt_config_from_args (0.19.2) forgets it and leaves 8, which is wrong for Llama 3.2 (32).
    config.rope_scaling_factor = args.rope_scaling_factor
    return models.GPTModelBuilder(config)


def build_tokenizer(args: argparse.Namespace, *, special_tokens: bool = True):
    """Megatron's own tokenizer for `args`: by default the one the checkpoint names.

    Args:
        args: From `parse_megatron_args`.
        special_tokens: False for one that adds none to a text, such as a begin-of-text, and leaves
            those it meets out of the text it gives.

    Raises:
        LowbitError: No tokenizer is named, its path does not exist, it asks for code of its own,
            it cannot be read, or it has tokens that the model has no embedding for.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as build

    if args.tokenizer_type is None:
        raise LowbitError("no tokenizer: pass --tokenizer-type and --tokenizer-model")
    path = str(args.tokenizer_model)
    # Without a separator it may be a hub's model name.
    if args.tokenizer_type == "HuggingFaceTokenizer" and os.sep in path and not Path(path).exists():
        raise LowbitError(f"--tokenizer-model {path}: no such directory")
    if Path(path).is_dir():
        refuse_own_code(Path(path))
    args.trust_remote_code = False
    if not special_tokens:
        without = {"tokenizer_hf_no_include_special_tokens": True}
        args = argparse.Namespace(**{**vars(args), **without})
    with quiet(), one_line_errors(f"--tokenizer-model {path}", "it cannot be read"):
        made = build(args)
        inner = getattr(made._tokenizer, "tokenizer", None)
        last = last_token(inner) if hasattr(inner, "get_vocab") else made.vocab_size - 1
    rows = getattr(args, "vocab_size", None) or args.padded_vocab_size
    if rows and last >= rows:
        raise LowbitError(
            f"--tokenizer-model {path}: it has tokens up to {last}, the checkpoint's vocabulary "
            f"ends at {rows - 1}: it is another model's tokenizer"
        )
    if rows:
        made.tokenize = _within(made.tokenize, rows)
    return made


def _within(tokenize: Callable, rows: int) -> Callable:
    """`tokenize`, refusing a text with tokens that the model has no embedding for."""

    @functools.wraps(tokenize)
    def checked(*args: Any, **kwargs: Any) -> list[int]:
        tokens = tokenize(*args, **kwargs)
        if tokens and max(tokens) >= rows:
            raise LowbitError(
                f"the tokenizer gives token {max(tokens)} for a text, the checkpoint's vocabulary "
                f"ends at {rows - 1}: leave the special token out of the text"
            )
        return tokens

    return checked


def vocabulary_size(args: argparse.Namespace, tokenizer: Any) -> int:
    """Entries of the vocabulary without padding: the checkpoint's, else the tokenizer's."""
    return getattr(args, "vocab_size", None) or tokenizer.vocab_size


def language_model(
    args: argparse.Namespace,
    model: nn.Module,
    tokenizer,
    *,
    group: dist.ProcessGroup,
    prefix: Sequence[int] = (),
) -> LanguageModel:
    """What measures see of a model of `load_whole_model`.

    The tokenizer is one without special tokens; `prefix` are those that it would put before every
    text with them. `group` is the tensor-parallel one.
    """
    return LanguageModel(
        logits=lambda tokens: logits(model, tokens),
        vocab_size=vocabulary_size(args, tokenizer),
        max_length=args.max_position_embeddings,
        tp_group=group,
        tokenize=tokenizer.tokenize,
        detokenize=tokenizer.detokenize,
        prefix=prefix,
        stages=stages_of(),
    )


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
