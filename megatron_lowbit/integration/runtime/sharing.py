"""Which ranks share the sequences of a loop over a model, and which run one together.

Data-parallel ranks run sequences of their own, as many as there are for each. Where experts are
spread over them they cannot: a rank without a sequence would be missed. Then the ranks that have
all experts between them run the same sequence.
"""

import argparse
from dataclasses import dataclass

import torch.distributed as dist

from megatron_lowbit.errors import LowbitError


@dataclass(frozen=True)
class Sharing:
    """The ranks of a pipeline stage, as a loop needs them.

    Attributes:
        group: This rank and those that run other sequences, one of each that run one together.
        together: Those that run a sequence together.
    """

    group: dist.ProcessGroup
    together: dist.ProcessGroup


def sharing(args: argparse.Namespace) -> Sharing:
    """Who shares sequences, for Megatron's `args`, after `session.initialize`."""
    from megatron.core import parallel_state

    if not experts_are_spread(args):
        group = parallel_state.get_data_parallel_group()
        return Sharing(group, parallel_state.get_tensor_model_parallel_group())
    return Sharing(
        parallel_state.get_expert_data_parallel_group(),
        parallel_state.get_expert_tensor_and_model_parallel_group(),
    )


def experts_are_spread(args: argparse.Namespace) -> bool:
    """Whether experts are on other data-parallel ranks, too."""
    return args.expert_model_parallel_size > most_experts(args)


def most_experts(args: argparse.Namespace) -> int:
    """The largest ``--expert-model-parallel-size`` within a tensor-parallel group."""
    ranks = args.tensor_model_parallel_size
    return max(ranks // (args.expert_tensor_parallel_size or ranks), 1)


def check_spread_experts(args: argparse.Namespace) -> None:
    """Raise `LowbitError` unless whole tensor-parallel groups have all experts between them."""
    if not experts_are_spread(args):
        return
    ranks, size = args.tensor_model_parallel_size, args.expert_model_parallel_size
    block = size * (args.expert_tensor_parallel_size or ranks)
    if block % ranks or args.world_size % (block * args.pipeline_model_parallel_size):
        raise LowbitError(
            f"--expert-model-parallel-size {size} spreads experts over {block} ranks, which "
            f"tensor parallel size {ranks} or the {args.world_size} ranks do not divide by: choose "
            "sizes that do"
        )
