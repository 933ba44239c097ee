"""The rotation of `rotated-hybrid`: fixed signs, then a block Hadamard transform.

The block is the largest power of two that divides the hidden size: 4096 -> 4096, 5120 -> 1024,
576 -> 64. An odd hidden size has blocks of one value, which rotate nothing: the codec still works
and loses the accuracy that the rotation brings. The transform is not normalized: applying it
twice multiplies by the block size, a power of two, so the factor costs no rounding.

Additions have a fixed order (butterflies with strides 1, 2, 4, ..., then a pairwise tree for the
sum of squares) and nothing is fused, so that a kernel can give the same bits.
"""

from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def block_size(hidden: int) -> int:
    """The largest power of two that divides `hidden`."""
    return hidden & -hidden


@lru_cache
def signs(hidden: int) -> Tensor:
    """fp32 ``[hidden]`` of +1 and -1, the same on every machine and in every release.

    The highest bit of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) with the feature's number as
    its state: a generator of a library may change with its version, this one cannot.
    """
    return torch.tensor([1.0 - 2.0 * (_splitmix64(feature) >> 63) for feature in range(hidden)])


def hadamard(values: Tensor) -> Tensor:
    """Unnormalized Walsh-Hadamard transform (Sylvester order) of each block of the last axis.

    Args:
        values: fp32 ``[tokens, hidden]``.

    Returns:
        fp32 ``[tokens, hidden]``; applied twice it gives ``block_size(hidden) * values``.
    """
    tokens, hidden = values.shape
    stride = 1
    while stride < block_size(hidden):
        pairs = values.view(tokens, hidden // (2 * stride), 2, stride)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        values = torch.stack([first + second, first - second], dim=2).view(tokens, hidden)
        stride *= 2
    return values


def sum_of_squares(values: Tensor) -> Tensor:
    """fp32 ``[tokens, 1]`` of fp32 ``[tokens, hidden]`` by a pairwise tree.

    The row is padded with zeros to a power of two, and its upper half is added to its lower half
    until one value is left.
    """
    hidden = values.shape[1]
    padded = 1 << (max(hidden, 1) - 1).bit_length()
    squares = torch.nn.functional.pad(values * values, (0, padded - hidden))
    while padded > 1:
        padded //= 2
        squares = squares[:, :padded] + squares[:, padded:]
    return squares


def root_mean(total: Tensor, count: int, *, plus: float = 0.0) -> Tensor:
    """fp32 sqrt(total / count + plus) of fp32 `total`, every step correctly rounded.

    That takes care with torch: on a GPU it divides by a number by way of its reciprocal, and on a
    CPU its fp32 square roots are those of Intel's vector library, one in five of which is not the
    nearest fp32 (torch 2.13, an AMD EPYC); those of fp64 are close enough for the nearest.
    """
    mean = total / torch.full((), float(count), device=total.device)
    return (mean + plus).double().sqrt().float()


def sum_norm(
    total: Tensor,
    apart: Tensor,
    weight: Tensor,
    epsilon: float,
    residual: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The end of `RotatedHybrid.decode_sum_norm`; `apart` are the features of the BF16 index."""
    for other in (bias, residual):
        if other is not None:
            total = total + other.float()
    squares = sum_of_squares(total.index_fill(1, apart, 0))
    squares = squares + sum_of_squares(total[:, apart])
    inverse = 1 / root_mean(squares, total.shape[1], plus=epsilon)
    return (total * inverse * weight.float()).to(weight.dtype), total.to(weight.dtype)


def token_scale(body: Tensor, kept: Tensor) -> Tensor:
    """BF16 ``[tokens, 1]``: the body's root mean square, or NaN for a row that is not all finite.

    Args:
        body: fp32 ``[tokens, n]``.
        kept: BF16 features of the same tokens, ``[tokens, k]``.
    """
    scale = root_mean(sum_of_squares(body), max(body.shape[1], 1))
    finite = scale.isfinite() & kept.isfinite().all(dim=1, keepdim=True)
    return torch.where(finite, scale, torch.nan).to(torch.bfloat16)


def _splitmix64(state: int) -> int:
    z = (state + 1) * _GOLDEN & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
