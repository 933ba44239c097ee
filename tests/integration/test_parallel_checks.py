"""Experts over data-parallel ranks: what tools refuse before a model is loaded."""

from argparse import Namespace

import pytest

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.loops.checks import check_parallel, refuse_pipeline


def parallel(ranks: int, tensor: int, expert_tensor: int | None, experts: int) -> Namespace:
    args = Namespace(pipeline_model_parallel_size=1, context_parallel_size=1, world_size=ranks)
    args.tensor_model_parallel_size, args.expert_tensor_parallel_size = tensor, expert_tensor
    args.expert_model_parallel_size = experts
    return args


@pytest.mark.parametrize(("expert_tensor", "experts"), [(None, 1), (1, 2)])
def test_experts_within_tensor_parallel_ranks_run_in_every_tool(expert_tensor, experts):
    args = parallel(8, 2, expert_tensor, experts)
    check_parallel(args)
    refuse_pipeline(args)


@pytest.mark.parametrize(
    ("tensor", "expert_tensor", "experts", "most"), [(2, None, 2, 1), (4, 2, 4, 2)]
)
def test_tools_that_run_texts_of_their_own_refuse_spread_experts(
    tensor, expert_tensor, experts, most
):
    """Data-parallel ranks would wait for each other for ever."""
    args = parallel(8, tensor, expert_tensor, experts)
    check_parallel(args)
    with pytest.raises(LowbitError, match=f"expert-model-parallel-size {experts} .*pass {most}$"):
        refuse_pipeline(args)


@pytest.mark.parametrize(
    ("ranks", "tensor", "expert_tensor", "experts"), [(6, 2, 1, 3), (8, 2, None, 3)]
)
def test_experts_are_spread_over_whole_groups(ranks, tensor, expert_tensor, experts):
    with pytest.raises(LowbitError, match=f"^--expert-model-parallel-size {experts} spreads"):
        check_parallel(parallel(ranks, tensor, expert_tensor, experts))
