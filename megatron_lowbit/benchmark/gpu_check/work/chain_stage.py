"""A model's own partials of all ranks, one sync point after the other with carries.

Every payload, carry and sum must have the bits that plain torch gives on this CPU, and those that
it gave where the partials were saved.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_lowbit.benchmark.gpu_check.saved_partials import Made, Saved, chain, digest, load
from megatron_lowbit.benchmark.gpu_check.stage_tasks import Row, Rows, Skip, Task
from megatron_lowbit.benchmark.gpu_check.work.attempts import attempts
from megatron_lowbit.benchmark.gpu_check.work.interpreted import interpret
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import same
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels.switches import disabled


def run(task: Task) -> Rows:
    """A row for each sync point; skipped without a file of partials."""
    path = Path(task.partials)
    if not path.is_file():
        raise Skip(f"no {path.name}: make it by tools/gpu_check.sh --save-partials CKPT")
    saved = load(path)
    if task.is_rehearsal:
        interpret()
        saved = saved.only(points=2, tokens=2)
    got = chain(saved, torch.device(task.device))
    with disabled():
        right = list(chain(saved, torch.device("cpu")))
    found = [
        (f"point {name}", check(saved, place, got, right)) for place, name in enumerate(saved.names)
    ]
    yield from attempts(found, task.device)


def check(saved: Saved, place: int, got: Iterator[Made], right: list[Made]) -> Callable[[], Row]:
    """What checks the sync point at `place`: the next that kernels give against plain torch's."""

    def compare() -> Row:
        mine = next(got, None)
        if mine is None:
            raise LowbitError("not done, as it needs what the one before gives")
        for what, values in mine.items():
            same(values, right[place][what], what)
        if saved.digests and digest(right[place]) != saved.digests[place]:
            raise LowbitError("plain torch gives other bits on this CPU than where it was saved")
        return {"tokens": len(mine["sum"])}

    return compare
