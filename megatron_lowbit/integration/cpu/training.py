"""What `megatron.training`'s start-up leaves out on a machine without CUDA.

`integration.cpu.device` answers for the device itself. Here are the steps that Megatron skips when
it finds none (model-parallel groups, the random number tracker) or insists on (CUDA at start, the
compiler for training's helpers). The tools take `initialize_cpu_parallel`; scripts that call
`initialize_megatron` themselves get all of it by `enable_cpu_training`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch

from megatron_lowbit.integration.rebinding import rebind

# Modules whose `_is_cuda` asserts that a tensor is on CUDA.
_BROADCASTS = (
    "megatron.core.inference.communication_utils",
    "megatron.inference.text_generation.communication",
)


def initialize_cpu_parallel(args: argparse.Namespace, store) -> None:
    """The process group, model-parallel groups and RNG tracker that Megatron makes with CUDA only.

    Args:
        args: Megatron's, validated.
        store: For the process group; torchrun's if None. Where a group exists it stays.
    """
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
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    # The inference tracker keeps no CUDA generator states.
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed, inference_rng_tracker=True)


def enable_cpu_training() -> None:
    """Let `initialize_megatron` of any release start without CUDA, for the life of the process."""
    from megatron.training import initialize

    original = initialize.initialize_megatron

    @functools.wraps(original)
    def initialize_megatron(*args, **kwargs):
        return original(*args, **{**kwargs, "allow_no_cuda": True})

    rebind(original, initialize_megatron)
    initialize._compile_dependencies = lambda: None
    _allow_cpu_broadcasts()
    initialize._initialize_distributed = _with_cpu_parallel(initialize)


def _with_cpu_parallel(initialize: ModuleType):
    """`_initialize_distributed` with the groups made first: Megatron then finds and keeps them."""
    original = initialize._initialize_distributed

    @functools.wraps(original)
    def initialize_distributed(get_embedding_ranks, get_position_embedding_ranks, store, **kwargs):
        from megatron.training import get_args

        if store is None and "MASTER_ADDR" not in os.environ:  # one process, without torchrun
            store = torch.distributed.HashStore()
        initialize_cpu_parallel(get_args(), store)
        original(get_embedding_ranks, get_position_embedding_ranks, store, **kwargs)

    return initialize_distributed


def _allow_cpu_broadcasts() -> None:
    """Let the text-generation servers broadcast their requests, which they want to be on CUDA."""
    for name in _BROADCASTS:
        with contextlib.suppress(ModuleNotFoundError):  # not in every release
            module: Any = importlib.import_module(name)
            module._is_cuda = lambda tensor: None
