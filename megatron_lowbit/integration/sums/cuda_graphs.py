"""CUDA graphs of a model: what of our work can be in them, and what they keep.

Megatron's graph managers (`cuda_graph_impl` local) and Transformer Engine's capture what a layer
does on the stream, our forward hooks and collectives included, and replay it without running any
Python. So the collective is the one that was chosen when a graph of this size was captured;
counters have the capture alone; and whatever is attached or removed afterwards is not seen by the
replays. On CUDA nothing of a collective waits for the host (tests/comm/test_capture.py), but a
codec's first call copies its constants to the device.
"""

import sys
from collections.abc import Iterable

from torch import nn

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.sums.sync_points import modules_of, transformer_layers


def check_cuda_graphs(model: nn.Module | Iterable[nn.Module], *, gathers: bool) -> None:
    """Raise `LowbitError` if the CUDA graphs of `model` could not hold or would not see our work.

    `gathers` says whether inputs of column-parallel linears are to be gathered in low bits.
    """
    check_no_graphs(model, "apply()")
    layer = next(iter(transformer_layers(model).values()), None)
    if layer is None:  # a stage may have none
        return
    # It had another name before 0.15.
    was_local = "local" if getattr(layer.config, "enable_cuda_graph", False) else None
    impl = getattr(layer.config, "cuda_graph_impl", was_local)
    if impl not in ("local", "full_iteration"):  # Transformer Engine's always warms up
        return
    if getattr(layer.config, "cuda_graph_warmup_steps", None) == 0:
        raise LowbitError(
            "cuda_graph_warmup_steps is 0: a codec's first call copies constants to the GPU, which "
            "a CUDA graph cannot capture; leave at least 1"
        )
    if impl == "local" and gathers and layer.training:
        raise LowbitError(
            "--lowbit-all-gather uses forward pre-hooks, which Megatron's CUDA graphs "
            "(cuda_graph_impl local) refuse in training: call model.eval() first, or leave it out"
        )


def check_no_graphs(model: nn.Module | Iterable[nn.Module], doing: str) -> None:
    """Raise `LowbitError` if a graph of `model` is captured, which `doing` could not reach."""
    for path, module in modules_of(model):
        if _has_graphs(module):
            raise LowbitError(
                f"{doing} would not reach the CUDA graphs that {path or 'the model'} has captured "
                "already: call it before the engine is made, or after Megatron's "
                "delete_cuda_graphs()"
            )
    if _has_whole_steps():
        raise LowbitError(
            f"{doing} would not reach the CUDA graph of whole training steps that Megatron has "
            "captured already: call it before the first step, or after reset_cuda_graph()"
        )


def _has_graphs(module: nn.Module) -> bool:
    runners = getattr(module, "cudagraph_runners", ())  # of a CudaGraphManager
    # Layers hold those of Transformer Engine themselves.
    return any(runner.fwd_graph is not None for runner in runners) or bool(
        getattr(module, "cuda_graphs", ())
    )


def _has_whole_steps() -> bool:
    """Whether the process replays its training or validation steps, under any `cuda_graph_impl`."""
    module = sys.modules.get("megatron.core.full_cuda_graph")
    wrapper = getattr(module, "FullCudaGraphWrapper", None)
    return any(graph is not None for graph in getattr(wrapper, "cuda_graph", {}).values())
