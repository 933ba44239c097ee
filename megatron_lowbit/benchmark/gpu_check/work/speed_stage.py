"""The figures of the kernels page, each checked before it is timed (`codec_bench`)."""

from functools import partial

import torch

from megatron_lowbit.benchmark.codecs import codec_bench
from megatron_lowbit.benchmark.gpu_check.stage_tasks import Row, Rows, Task
from megatron_lowbit.benchmark.gpu_check.work.attempts import Case, attempts
from megatron_lowbit.benchmark.gpu_check.work.bit_stage import HIDDEN, MEASURED, RANKS
from megatron_lowbit.benchmark.gpu_check.work.interpreted import interpret

LONG, SHORT = 4096, (1, 16, 64)  # tokens
_SECONDS = 0.1  # for each case


def run(task: Task) -> Rows:
    """A row for each shape and codec, whose ``rows`` are those of `codec_bench`."""
    shapes, ranks, seconds = [(n, HIDDEN) for n in (LONG, *SHORT)], RANKS, _SECONDS
    names: tuple[str, ...] = MEASURED
    if task.is_rehearsal:
        interpret()
        shapes, names, ranks, seconds = [(1, 64)], MEASURED[:1], 2, 0.001
    found: list[Case] = [
        (
            f"{name} {shape[0]} x {shape[1]}",
            partial(_measure, task.device, name, shape, ranks, seconds),
        )
        for shape in shapes
        for name in names
    ]
    yield from attempts(found, task.device)


def _measure(device: str, name: str, shape: tuple[int, int], ranks: int, seconds: float) -> Row:
    plan = codec_bench.Plan(
        codecs=(name,),
        shapes=[shape],
        ranks=ranks,
        seconds=seconds,
        device=torch.device(device),
    )
    said: list[str] = []
    rows = codec_bench.run(plan, said.append)
    return {"copy": said[0], "rows": rows}
