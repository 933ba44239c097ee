"""Bytes of a row: packing of small integers, BF16 values, and the order of both.

Codes are packed little-endian: the first code is in the lowest bits of the first byte. Codes of
`bits` bits are taken in the smallest group that fills whole bytes (4 bits: 2 codes in 1 byte,
3 bits: 8 codes in 3 bytes), and the last group is padded with zeros.
"""

import math

import torch
from torch import Tensor

from megatron_lowbit.kernels.layout import row_bytes as row_bytes

_BF16_MAX = torch.finfo(torch.bfloat16).max


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    codes, group_bytes = _group(bits)
    return math.ceil(count / codes) * group_bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: Integer ``[tokens, count]`` with values in ``[0, 2**bits)``.
        bits: 1 to 8.

    Returns:
        ``uint8 [tokens, packed_bytes(count, bits)]``.
    """
    group, group_bytes = _group(bits)
    tokens, count = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -count % group))
    lanes = codes.view(tokens, codes.shape[1] // group, group).to(_word(bits)).unbind(-1)
    word = lanes[0].clone()
    for lane, value in enumerate(lanes[1:], start=1):
        word |= value << (bits * lane)
    out = torch.stack([(word >> (8 * byte)) & 255 for byte in range(group_bytes)], dim=-1)
    return out.to(torch.uint8).flatten(1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Read `count` codes back from ``uint8 [..., packed_bytes]`` as int32 ``[..., count]``."""
    group, group_bytes = _group(bits)
    lanes = packed.unflatten(-1, (packed.shape[-1] // group_bytes, group_bytes))
    lanes = lanes.to(_word(bits)).unbind(-1)
    word = lanes[0].clone()
    for byte, value in enumerate(lanes[1:], start=1):
        word |= value << (8 * byte)
    mask = (1 << bits) - 1
    codes = torch.stack([(word >> (bits * lane)) & mask for lane in range(group)], dim=-1)
    return codes.flatten(-2)[..., :count].to(torch.int32)


def to_wire_bf16(values: Tensor) -> Tensor:
    """BF16 of `values`: finite ones saturate, infinities become NaN (never a plausible number)."""
    values = values.float()
    finite = values.clamp(-_BF16_MAX, _BF16_MAX)
    return torch.where(values.isinf(), torch.nan, finite).to(torch.bfloat16)


def bytes_of(numbers: Tensor) -> Tensor:
    """The bytes of ``[tokens, m]`` of any dtype as ``uint8 [tokens, m * itemsize]``."""
    tokens, count = numbers.shape
    # By way of one dimension: torch will not view an empty [0, 1] as another type.
    return numbers.flatten().view(torch.uint8).view(tokens, count * numbers.itemsize)


def join_row(body: Tensor, floats: Tensor) -> Tensor:
    """Put ``uint8 [tokens, n]`` and ``bf16 [tokens, m]`` into rows; see `codecs.base`."""
    if floats.shape[1] == 0:
        return body.contiguous()
    body = torch.nn.functional.pad(body, (0, body.shape[1] % 2))
    return torch.cat([body, bytes_of(floats)], dim=1)


def split_row(rows: Tensor, body_bytes: int) -> tuple[Tensor, Tensor]:
    """The body, uint8 ``[..., body_bytes]``, and the floats, fp32 ``[..., m]``, of rows."""
    floats = rows[..., body_bytes + body_bytes % 2 :]
    if floats.shape[-1] == 0:
        return rows, floats.float()
    return rows[..., :body_bytes], floats.contiguous().view(torch.bfloat16).float()


def _group(bits: int) -> tuple[int, int]:
    """Codes and bytes of the smallest group of codes that fills whole bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _word(bits: int) -> torch.dtype:
    """An integer type that holds one group."""
    group, _ = _group(bits)
    return torch.int32 if group * bits < 32 else torch.int64
