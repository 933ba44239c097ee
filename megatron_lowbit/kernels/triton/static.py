"""``static-hybrid`` in Triton: one program a token, one pass over its data.

The bits are those of `codecs.static_hybrid`, its plain-torch code; only the bits of a NaN in a sum
may differ. At 4 bits encode moves 2 bytes a value in and 0.5 out, decode_sum 0.5 in for each rank
and 2 out. How the body is gathered and scattered is in `gathered`.
What arguments, results and errors are is in `megatron_lowbit.kernels`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lowbit.kernels.layout import row_bytes
from megatron_lowbit.kernels.triton import gathered as gathered
from megatron_lowbit.kernels.triton.launching import new_payload, sum_into
from megatron_lowbit.kernels.triton.parts import values as parts


@triton.jit
def _encode(
    partial,  # fp32, fp16 or the bits of BF16 [tokens, hidden]
    row_stride,
    column_stride,
    scale,  # fp32 [hidden]: the step of each feature
    body_index,  # int64 [BODY]
    bf16_index,  # int64 [kept]
    kept,
    payload,  # uint8 [tokens, row_bytes]
    row_bytes,
    BODY: tl.constexpr,
    KEPT: tl.constexpr,  # a power of two, at least `kept`; or 0
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # offsets may pass 2**31
    partial += token * row_stride
    payload += token * row_bytes
    feature, inside = gathered.features(body_index, BODY, LOG_TILE)
    values = parts.load_floats(partial + feature * column_stride, inside)
    step = tl.load(scale + feature, mask=inside, other=0.0)
    inverse = tl.where(step > 0, tl.div_rn(1.0, step), 0.0)
    largest: tl.constexpr = (1 << (BITS - 1)) - 1
    codes = parts.round_within(values * inverse, -largest, largest)
    finite = tl.abs(values) < float("inf")
    codes = tl.where(finite, codes, -(1 << (BITS - 1))) & ((1 << BITS) - 1)
    if KEPT:
        gathered.write_kept(partial, column_stride, bf16_index, kept, payload, BODY_BYTES, KEPT)
        parts.pack(tl.where(inside, codes, 0), payload, BODY_BYTES, BITS, LOG_TILE)
    else:
        parts.pack_bytes(tl.where(inside, codes, 0), payload, BODY_BYTES, BITS, LOG_TILE)


@torch.library.custom_op("megatron_lowbit::static_encode", mutates_args=())
def encode(
    partial: Tensor,
    scale: Tensor,
    body_index: Tensor,
    bf16_index: Tensor,
    bits: int,
    body_bytes: int,
) -> Tensor:
    """Write a partial into a payload.

    Args:
        scale: fp32 ``[hidden]``, contiguous: the value of one step of each feature.
        bits: 3 to 8.
    """
    row = row_bytes(body_bytes, bf16_index.numel())
    tables = (scale, body_index, bf16_index)
    return gathered.launch_encode(_encode, partial, row, *tables, BODY_BYTES=body_bytes, BITS=bits)


@encode.register_fake
def _(partial, scale, body_index, bf16_index, bits, body_bytes):
    return new_payload(partial, partial.shape[0], row_bytes(body_bytes, bf16_index.numel()))


def decode_sum(payloads: Tensor, *, out: Tensor | None = None, **tables) -> Tensor:
    """Sum the partials of all ranks from their payloads, in fp32 and in rank order."""
    out = sum_into(out, payloads, tables["scale"].shape[1])
    decode_sum_into(out, payloads, **tables)
    return out


@torch.library.custom_op("megatron_lowbit::static_decode_sum", mutates_args=("out",))
def decode_sum_into(
    out: Tensor,
    payloads: Tensor,
    scale: Tensor,
    body_index: Tensor,
    bf16_index: Tensor,
    bits: int,
    body_bytes: int,
) -> None:
    """The op behind `decode_sum`.

    Args:
        scale: fp32 ``[at least ranks, hidden]``, contiguous.
        bits: 3 to 8.
    """
    gathered.launch_decode_sum(
        out,
        payloads,
        row_bytes(body_bytes, bf16_index.numel()),
        scale=scale,
        body_index=body_index,
        bf16_index=bf16_index,
        bits=bits,
        body_bytes=body_bytes,
    )
