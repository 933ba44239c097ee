"""A codec of another package over real ranks: every collective, and error feedback."""

import sys
from itertools import product

import torch
import torch.distributed as dist
from foreign_package import NAME, example, install
from ranks import on_each_rank
from test_feedback import chain_of
from test_feedback import expected as fed_back
from worker import Case, check

import megatron_lowbit

COLLECTIVES = ["one-shot", "two-shot", "hierarchical", "reduce-scatter", "all-gather"]


@on_each_rank(4)
def test_every_collective_and_feedback_take_it(rank, tmp_path):
    if rank == 0:
        install(tmp_path, example())
    dist.barrier()
    sys.path.insert(0, str(tmp_path))
    shared = {"codec": NAME, "dtype": torch.bfloat16, "kept": 0, "chunk_values": 64, "seed": 3}
    for collective, bits in product(COLLECTIVES, ((6, 6), (4, 6))):
        check(rank, Case(bits=bits, collective=collective, shape=(8, 33), **shared))
    codec, steps = chain_of(NAME, (4, 6), (7,), dist.get_world_size())
    for collective in ("one-shot", "two-shot"):
        feedback = megatron_lowbit.ErrorFeedback()
        sums = fed_back(codec, steps, collective)
        for (partials, tables), wanted in zip(steps, sums, strict=True):
            call = {"codec": codec, "tables": tables, "feedback": feedback}
            got = megatron_lowbit.all_reduce(partials[rank], collective=collective, **call)
            assert torch.equal(got, wanted), collective
