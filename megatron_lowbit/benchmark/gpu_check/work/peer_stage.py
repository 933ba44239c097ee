"""All-reduces over symmetric memory: as many ranks as this stage has processes, on one GPU."""

import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lowbit.benchmark.gpu_check.stage_tasks import Rows, Task
from megatron_lowbit.benchmark.gpu_check.work import peer_cases
from megatron_lowbit.benchmark.gpu_check.work.attempts import Case, attempts
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import interpret
from megatron_lowbit.kernels.peer_memory import PeerMemory

_COLLECTIVES = ("one-shot", "two-shot")
_SECONDS = 20.0  # that a rank waits for its peers


def run(task: Task) -> Rows:
    """A row for each call, by each rank; all ranks end with the last one."""
    if os.path.exists("/sys/class/net/lo"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(Path(task.directory) / "store"), task.parts)
    dist.init_process_group("gloo", store=store, rank=task.part, world_size=task.parts)
    memory = _memory(task)
    for row in attempts(_cases(memory, task.is_rehearsal), task.device):
        yield {**row, "case": f"rank {task.part}: {row['case']}"}
    dist.barrier()  # a rank that ended would take its memory along


def _memory(task: Task) -> PeerMemory:
    if not task.is_rehearsal:
        return peer_cases.opened(torch.device("cuda", 0))
    interpret()
    directory = Path(task.directory)
    return peer_cases.mapped(task.part, task.parts, directory, programs=2, seconds=_SECONDS)


def _cases(memory: PeerMemory, is_rehearsal: bool) -> list[Case]:
    numbers = range(2) if is_rehearsal else range(len(peer_cases.CALLS))
    graphs = () if is_rehearsal else _COLLECTIVES
    return [
        *((_title(number), partial(peer_cases.check_call, memory, number)) for number in numbers),
        *((f"carry {c}", partial(peer_cases.check_carried_call, memory, c)) for c in _COLLECTIVES),
        *((f"graph {c}", partial(peer_cases.check_graph_call, memory, c)) for c in graphs),
        ("a missing rank", partial(peer_cases.check_missing_rank, memory)),
    ]


def _title(number: int) -> str:
    name, bits, collective, tokens, hidden, *_ = peer_cases.CALLS[number]
    return f"{name} {bits} bits {collective} {tokens} x {hidden}"
