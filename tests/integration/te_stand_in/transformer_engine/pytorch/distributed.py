"""TE's collectives, with their names and results, over torch.distributed."""

import torch
import torch.distributed as dist


class CudaRNGStatesTracker:
    """A base class for megatron.core."""


def activation_recompute_forward(*args, **kwargs):
    """A name that megatron.core imports."""
    raise NotImplementedError


def allreduce(inp, tp_group=None, async_op=False):
    dist.all_reduce(inp, group=tp_group)
    return inp, None


def reduce_scatter_along_first_dim(inp, tp_group, async_op=False):
    ranks = dist.get_world_size(tp_group)
    out = torch.empty(inp.shape[0] // ranks, *inp.shape[1:], dtype=inp.dtype)
    dist.reduce_scatter_tensor(out, inp.contiguous(), group=tp_group)
    return out, None


def gather_along_first_dim(inp, process_group, async_op=False, quantizer=None):
    ranks = dist.get_world_size(process_group)
    out = torch.empty(inp.shape[0] * ranks, *inp.shape[1:], dtype=inp.dtype)
    dist.all_gather_into_tensor(out, inp.contiguous(), group=process_group)
    return out, None
