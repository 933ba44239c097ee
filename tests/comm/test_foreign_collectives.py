"""A codec of another package over real ranks: every collective, and error feedback."""

import sys

import torch
import torch.distributed as dist
from foreign_package import NAME, example, install, looked_at_anew
from ranks import run_ranks
from test_feedback import chain_of
from test_feedback import expected as fed_back
from worker import Case, own_part, run_cases
from worker import expected as expected_of

import megatron_lowbit

COLLECTIVES = ["one-shot", "two-shot", "hierarchical", "reduce-scatter", "all-gather"]


def cases() -> list[Case]:
    shared = {"codec": NAME, "dtype": torch.bfloat16, "kept": 0, "chunk_values": 64, "seed": 3}
    return [
        Case(bits=bits, collective=collective, shape=(8, 33), **shared)
        for collective in COLLECTIVES
        for bits in ((6, 6), (4, 6))
    ]


def rank_all(rank: int, place: str) -> list[dict]:
    sys.path.insert(0, place)
    results = run_cases(rank, cases())
    for collective in ("one-shot", "two-shot"):
        codec, steps = chain_of(NAME, (4, 6), (7,), dist.get_world_size())
        feedback = megatron_lowbit.ErrorFeedback()
        for (partials, tables), wanted in zip(
            steps, fed_back(codec, steps, collective), strict=True
        ):
            call = {"codec": codec, "tables": tables, "feedback": feedback}
            got = megatron_lowbit.all_reduce(partials[rank], collective=collective, **call)
            assert torch.equal(got, wanted), collective
    return results


def test_every_collective_and_feedback_take_it(tmp_path, monkeypatch):
    install(tmp_path, example())
    monkeypatch.syspath_prepend(tmp_path)
    ranks = 4
    by_rank = run_ranks(ranks, rank_all, tmp_path / "ranks", str(tmp_path))
    with looked_at_anew():
        for number, case in enumerate(cases()):
            total = expected_of(case, ranks)
            for rank, results in enumerate(by_rank):
                got = results[number]["out"]
                assert torch.equal(got, own_part(case, total, ranks, rank)), (rank, case)
