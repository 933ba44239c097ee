"""Checks of arguments that the tools share: what can be refused before a model is loaded."""

import argparse

from megatron_lowbit.calibration.plan import SKIP, bits_per_value, candidates
from megatron_lowbit.codecs import Codec
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.runtime.sharing import (
    check_spread_experts,
    experts_are_spread,
    most_experts,
)


def refuse_pipeline(args: argparse.Namespace) -> None:
    """Raise where a tool runs a model that is whole on its tensor-parallel ranks."""
    if args.pipeline_model_parallel_size > 1:
        raise LowbitError(
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size} is not supported "
            "here: pass 1"
        )
    if experts_are_spread(args):
        raise LowbitError(
            f"--expert-model-parallel-size {args.expert_model_parallel_size} spreads experts over "
            "data-parallel ranks, which run texts of their own here: pass "
            f"{most_experts(args)}"
        )
    check_parallel(args)


def check_parallel(args: argparse.Namespace) -> None:
    """Raise where a tool that knows pipelines and spread experts cannot run the model either."""
    if args.context_parallel_size > 1:
        raise LowbitError(
            f"--context-parallel-size {args.context_parallel_size} is not supported here: pass 1"
        )
    if args.pipeline_model_parallel_size > 1:
        _check_stages(args)
    check_spread_experts(args)


def _check_stages(args: argparse.Namespace) -> None:
    """Raise for a pipeline that Megatron's plain schedule does not run, or not exactly."""
    stages = f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}"
    if args.virtual_pipeline_model_parallel_size is not None:
        raise LowbitError(
            f"{stages} with virtual stages is not supported here: leave the arguments that "
            "interleave stages out; the calibration index serves them, too"
        )
    if args.fp32_residual_connection:
        raise LowbitError(
            f"{stages} with --fp32-residual-connection is not supported: Megatron hands "
            "activations on in the model's dtype"
        )


def feature_count(text: str | None, hidden: int, codec: Codec) -> int:
    """How many BF16 features ``--bf16-features`` means: a count, or a fraction of `hidden`."""
    if text is not None and not codec.takes_index:
        raise LowbitError(
            f"--bf16-features {text} means nothing to codec {codec.name}: leave it out"
        )
    if text is None:
        return codec.default_bf16_features(hidden)
    try:
        count = int(text) if text.lstrip("+-").isdigit() else int(float(text) * hidden)
    except (ValueError, OverflowError):
        raise LowbitError(f"--bf16-features {text}: not a finite number") from None
    if not 0 <= count <= hidden:
        raise LowbitError(f"--bf16-features {text}: not within 0 and the hidden size {hidden}")
    return count


def check_length(args: argparse.Namespace, seq_length: int) -> None:
    """Raise if the model has fewer positions than a sequence has tokens."""
    if seq_length > args.max_position_embeddings:
        raise LowbitError(
            f"--seq-length {seq_length}: the model has {args.max_position_embeddings} positions"
        )


def check_recipe(options: argparse.Namespace, args: argparse.Namespace) -> None:
    """Raise if a recipe that was asked for cannot be planned."""
    if options.budget is None and options.target_loss is None:
        return
    if args.tensor_model_parallel_size == 1 and (options.simulate_tp or 1) == 1:
        raise LowbitError(
            "tensor parallel size 1 communicates nothing: a recipe needs ranks, or --simulate-tp N"
        )
    least = min(
        bits_per_value(assignment, args.hidden_size)
        for assignment in candidates(args.hidden_size)
        if options.skip or assignment != SKIP
    )
    if options.budget is not None and options.budget < least:
        raise LowbitError(
            f"--budget {options.budget:g} is below what the codecs can do here: ask for "
            f"{least:.2f} or more"
        )


def megatron_argv(argv: list[str], simulate_tp: int | None) -> list[str]:
    """Megatron's arguments; in simulation with tensor parallel size 1.

    Raises:
        LowbitError: In simulation they name another tensor parallel size.
    """
    if not simulate_tp:
        return argv
    flag = "--tensor-model-parallel-size"
    if any(word.split("=")[0] == flag for word in argv):
        raise LowbitError(f"{flag} with --simulate-tp {simulate_tp}: leave it out, it is 1 then")
    return [*argv, flag, "1"]
