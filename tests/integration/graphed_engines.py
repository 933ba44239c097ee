"""Megatron's dynamic engine with CUDA graphs, on a CPU.

Managers and runners of graphs are Megatron's own, over cuda_graph_stand_in.py.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import NamedTuple

import cuda_graph_stand_in
import pytest
import torch
from cuda_graph_stand_in import CUDAGraph
from engines import accepted, counted, greedy
from small_gpt import build, leave_engine_mode

from megatron_lowbit.comm.traffic import Clock
from megatron_lowbit.integration.cpu.device import CpuEvent
from megatron_lowbit.kernels.switches import disabled

# Options of an engine with a graph for steps that only decode.
DECODE_ONLY = {"num_cuda_graphs": 1, "use_cuda_graphs_for_non_decode_steps": False}


@contextlib.contextmanager
def graphs_on_a_cpu() -> Iterator[None]:
    """Graphs, attention that looks at values as one step of them, and the clocks of a GPU."""
    from megatron.core.transformer import attention

    collectives = importlib.import_module("megatron_lowbit.comm.all_reduce")
    with pytest.MonkeyPatch.context() as patch, disabled():  # the dispatcher does not see C
        cuda_graph_stand_in.install(patch)
        for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):
            patch.setattr(attention, name, cuda_graph_stand_in.opaque(getattr(attention, name)))
        # A GPU is late: nothing has passed when the host asks.
        late = cuda_graph_stand_in.not_in_a_capture(lambda event: False)
        patch.setattr(CpuEvent, "query", late)
        patch.setattr(collectives, "Clock", lambda device: Clock(torch.device("cuda")))
        yield
        clean()


def clean() -> None:
    """Engines and graphs leave marks on the process."""
    leave_engine_mode()
    with contextlib.suppress(ImportError):
        from megatron.core.transformer.cuda_graphs import delete_cuda_graphs

        delete_cuda_graphs()


def graphed(**config):
    """The model of which Megatron captures the layers, in the words of this release."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    on = {"cuda_graph_impl": "local", "enable_cuda_graph": True}
    name = next(name for name in on if name in accepted(TransformerConfig, on))
    return build(torch.float32, **{name: on[name]}, **config)


class Run(NamedTuple):
    """New tokens, what went through the model in Python, and what replays did."""

    tokens: list[list[int]]
    seen: list
    replays: int
    sent_bytes: int


def watched(model, engine) -> Run:
    before = _replays()
    with counted(model) as seen:
        tokens = greedy(engine)
    replays, sent_bytes = (now - then for now, then in zip(_replays(), before, strict=True))
    return Run(tokens, seen, replays, sent_bytes)


def _replays() -> tuple[int, int]:
    """Of all graphs of this process: how many, and the bytes that they sent."""
    graphs = CUDAGraph.captured
    return sum(graph.replays for graph in graphs), sum(graph.sent_bytes for graph in graphs)


def captured_sums(handle) -> dict:
    """What statistics say of the sums in CUDA graphs."""
    why = "fixed, in a CUDA graph: replays are not counted"
    (captured,) = (choice for choice in handle.stats()["total"] if choice["why"] == why)
    return captured
