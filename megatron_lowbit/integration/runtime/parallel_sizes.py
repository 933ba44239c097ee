"""Checks of the sizes of Megatron's parallel groups, before Megatron itself divides by them."""

import argparse

from megatron_lowbit.errors import LowbitError

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def check_parallel_sizes(args: argparse.Namespace) -> None:
    """Raises LowbitError for a size below 1, or one that world size or model does not divide by."""
    for name in _SIZES:
        size = getattr(args, name)
        if size is not None and size < 1:
            raise LowbitError(f"--{name.replace('_', '-')} {size}: give 1 or more")
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
