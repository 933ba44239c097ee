"""The low-bit all-reduce: any shape, any float dtype, differentiable, with accounting.

Contract, for every codec and collective (README, "What it promises"): all ranks end with the same
bits; sums are fp32 in rank order; any number of tokens, zero included; the output has the input's
dtype; a NaN or infinity in a token gives NaN in that token alone; the backward pass is the
identity, as that of Megatron's `reduce_from_tensor_model_parallel_region`.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import DEFAULT_CODEC, Codec, Tables, get_codec
from megatron_lowbit.comm.one_shot import one_shot
from megatron_lowbit.errors import LowbitError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Traffic:
    """What went through a sync point: real payload sizes, added up call by call.

    Attributes:
        calls: All-reduces.
        tokens: Tokens reduced.
        values: Values reduced (tokens x hidden).
        payload_bytes: Bytes of this rank's own payloads.
        sent_bytes: Bytes that this rank sent.
    """

    calls: int = 0
    tokens: int = 0
    values: int = 0
    payload_bytes: int = 0
    sent_bytes: int = 0

    @property
    def bits_per_value(self) -> float:
        """Payload bits per value; NaN before the first call."""
        return 8 * self.payload_bytes / self.values if self.values else float("nan")


def all_reduce(
    x: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    codec: str | Codec = DEFAULT_CODEC,
    tables: Tables | None = None,
    traffic: Traffic | None = None,
) -> Tensor:
    """Sum `x` over the ranks of `group` with low-bit payloads on the wire.

    Args:
        x: bf16, fp16 or fp32 ``[..., hidden]``, of the same shape on every rank; not modified.
        group: The process group; the default group if left out. With one rank nothing is sent and
            `x` itself is returned, as Megatron does.
        codec: A codec, or its name (`megatron_lowbit.get_codec` for other bits).
        tables: What calibration knows of this tensor (`codec.tables`). Left out: no feature
            travels in BF16, which codecs with calibrated ranges refuse.
        traffic: Counters to add this call to.

    Returns:
        The sum, of `x`'s shape and dtype, bit-identical on all ranks.

    Raises:
        LowbitError: Unsupported dtype, no feature dimension, unknown codec, or tables of another
            codec, hidden size or number of ranks.
    """
    codec = get_codec(codec) if isinstance(codec, str) else codec
    _check_input(x)
    ranks = dist.get_world_size(group)
    if tables is None:
        tables = codec.tables(x.shape[-1], device=x.device)
    _check_tables(tables, codec, x.shape[-1], ranks)
    if ranks == 1:
        return x
    return _AllReduce.apply(x, tables, codec, group or dist.group.WORLD, traffic)


def _check_input(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise LowbitError(f"cannot all-reduce {x.dtype} in low bits: supported are {supported}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise LowbitError(f"all_reduce needs [..., hidden], got shape {tuple(x.shape)}")


def _check_tables(tables: Tables, codec: Codec, hidden: int, ranks: int) -> None:
    """Raise on every rank alike, before any of them sends."""
    if tables.codec != codec.name:
        raise LowbitError(f"tables are of codec {tables.codec}, the codec is {codec.name}")
    if tables.hidden != hidden:
        raise LowbitError(f"tables are for hidden size {tables.hidden}, the tensor has {hidden}")
    if tables.scale is not None and len(tables.scale) != ranks:
        raise LowbitError(f"tables are for {len(tables.scale)} ranks, the group has {ranks}")


class _AllReduce(torch.autograd.Function):
    """The sum over ranks; every rank's gradient is the gradient of the sum."""

    @staticmethod
    def forward(ctx, x, tables, codec, group, traffic):
        partial = x.reshape(-1, x.shape[-1])
        total, payload_bytes, sent_bytes = one_shot(partial, tables, codec=codec, group=group)
        if traffic is not None:
            traffic.calls += 1
            traffic.tokens += len(partial)
            traffic.values += x.numel()
            traffic.payload_bytes += payload_bytes
            traffic.sent_bytes += sent_bytes
        return total.to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None, None
