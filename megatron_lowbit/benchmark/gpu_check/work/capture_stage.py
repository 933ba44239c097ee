"""CUDA graphs that replay with other inputs; rows that are not finite, strides, far addresses."""

from functools import partial

import torch

from megatron_lowbit.benchmark.gpu_check.stage_tasks import Rows, Skip, Task
from megatron_lowbit.benchmark.gpu_check.work import hard_cases
from megatron_lowbit.benchmark.gpu_check.work.attempts import Case, attempts
from megatron_lowbit.benchmark.gpu_check.work.interpreted import interpret
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import ALL, DTYPES, WAYS
from megatron_lowbit.errors import LowbitError


def run(task: Task) -> Rows:
    """A row for each case; in a rehearsal a few without graphs."""
    if task.is_rehearsal:
        interpret()
        yield from attempts(task.mine(_few(task.device)), task.device)
        raise Skip("a rehearsal captures no CUDA graph: what needs none was right")
    yield from attempts(task.mine(_all(task.device)), task.device)


def _few(device: str) -> list[Case]:
    return [
        ("static-hybrid not finite", partial(hard_cases.check_not_finite, "static-hybrid", device)),
        ("carry not finite", partial(hard_cases.check_carry_not_finite, device)),
    ]


def _all(device: str) -> list[Case]:
    graphs = ["shaped-hybrid", *WAYS]
    return [
        *((f"{n} in a graph", partial(hard_cases.check_graph, n, device)) for n in graphs),
        *((f"{n} not finite", partial(hard_cases.check_not_finite, n, device)) for n in ALL),
        ("carry not finite", partial(hard_cases.check_carry_not_finite, device)),
        *(_strides(name, dtype, device) for name in WAYS for dtype in DTYPES),
        *(_carry_strides(dtype, device) for dtype in DTYPES),
        *((f"{n} far", partial(_far, n, device)) for n in ("rotated-hybrid", "int4-g32")),
        ("carry far", partial(_far, "", device)),
    ]


def _strides(name: str, dtype: torch.dtype, device: str) -> Case:
    return f"{name} strides {dtype}", partial(hard_cases.check_strides, name, dtype, device)


def _carry_strides(dtype: torch.dtype, device: str) -> Case:
    return f"carry strides {dtype}", partial(hard_cases.check_carry_strides, dtype, device)


def _far(name: str, device: str) -> None:
    """Of a codec, or of a carry if it has no name."""
    far = hard_cases.far_memory(device)
    if far is None:
        raise LowbitError("no 4 GiB to reserve on this GPU")
    if name:
        hard_cases.check_far(name, far)
    else:
        hard_cases.check_far_carry(far)
