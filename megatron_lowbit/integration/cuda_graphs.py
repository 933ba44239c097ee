"""CUDA graphs of a model: what has been captured keeps its sums.

Megatron's graph managers (`cuda_graph_impl` local) and Transformer Engine's capture what a layer
does on the stream, our hooks and collectives included, and replay it without running any Python. So
the collective is the one that was chosen when a graph of this size was captured; counters have the
capture alone; and whatever is attached or removed afterwards is not seen by the replays.
"""

from collections.abc import Iterable

from torch import nn

from megatron_lowbit.errors import LowbitError


def check_no_graphs(model: nn.Module | Iterable[nn.Module], doing: str) -> None:
    """Raise `LowbitError` if a graph of `model` is captured, which `doing` could not reach."""
    for chunk in [model] if isinstance(model, nn.Module) else model:
        for path, module in chunk.named_modules():
            if _has_graphs(module):
                raise LowbitError(
                    f"{doing} would not reach the CUDA graphs that {path or 'the model'} has "
                    "captured already: call it before the engine is made, or after Megatron's "
                    "delete_cuda_graphs()"
                )


def _has_graphs(module: nn.Module) -> bool:
    runners = getattr(module, "cudagraph_runners", ())  # of a CudaGraphManager
    # Layers hold those of Transformer Engine themselves.
    return any(runner.fwd_graph is not None for runner in runners) or bool(
        getattr(module, "cuda_graphs", ())
    )
