"""The rotation folded into the weight that makes the partial: encoding is then scale and pack.

A rotated codec multiplies a partial by fixed numbers and rotates it, both linear and known when the
model is loaded: ``R (W x) = (R W) x``. `fold` puts them into the weight, with the rows of the BF16
features behind, so that one matrix product yields rows ``[rotated body | BF16 features]``.
Payloads have the same form as before, and the sum is turned back as before.

What it costs in error: the rotated weight is rounded to the weight's dtype, and so is every rotated
value, where the codec itself rotates a partial of that dtype in fp32. The scale is normalized by a
power of two near 1 / sqrt(block), so that rotated values are about as large as partials are, and
fp16 does not overflow.
"""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_lowbit.codecs import rotation
from megatron_lowbit.codecs.tables import Tables
from megatron_lowbit.errors import LowbitError

FOLDABLE = (torch.bfloat16, torch.float16, torch.float32)


def fold(weight: Tensor, tables: Tables) -> tuple[Tensor, Tables]:
    """Fold a codec's rotation into a weight.

    Args:
        weight: Floating point ``[hidden, inputs]``.
        tables: Of a rotated codec (``rotated-hybrid``, ``shaped-hybrid``) for the partials that
            `weight` makes.

    Returns:
        The folded weight, ``[hidden + k, inputs]`` of the same dtype, and the tables for what it
        makes.

    Raises:
        LowbitError: The codec has no rotation, or `weight` is not ``[hidden, inputs]`` in bf16,
            fp16 or fp32.
    """
    if tables.encode_scale is None:
        raise LowbitError(f"codec {tables.codec} has no rotation to fold: use rotated-hybrid")
    if weight.dtype not in FOLDABLE:
        raise LowbitError(
            f"cannot fold a rotation into a quantized weight ({weight.dtype}): leave out fold"
        )
    if weight.shape[0] != tables.hidden:
        raise LowbitError(
            f"a weight of {weight.shape[0]} rows, tables for {tables.hidden}: give those of its "
            "sync point"
        )
    norm = _norm(tables.hidden)
    scale = tables.encode_scale * norm
    columns = weight.float().t() * scale
    columns[:, tables.bf16_index] = 0
    rows = torch.cat([rotation.hadamard(columns).t(), weight[tables.bf16_index].float()])
    center = tables.center
    if center is not None:
        center = rotation.hadamard(center * scale)
    width = tables.hidden + tables.bf16_index.numel()
    return rows.to(weight.dtype), replace(
        tables,
        encode_scale=torch.ones_like(tables.encode_scale),
        decode_scale=tables.decode_scale / norm,
        center=center,
        folded_index=torch.arange(tables.hidden, width, device=weight.device),
    )


def _norm(hidden: int) -> float:
    """A power of two near 1 / sqrt(block): multiplying by it rounds nothing."""
    return 2.0 ** -((rotation.block_size(hidden).bit_length() - 1) // 2)
