"""``scaled-hybrid`` in Triton: one program a token, one pass over its data.

The bits are those of `codecs.scaled_hybrid`, its plain-torch code; only the bits of a NaN in a sum
may differ. It moves as many bytes as `static`, and 2 more a token for its scale. The tables,
4 bytes a feature each and 8 of the body's index, stay in the caches; those of the scales are as
many as there are ranks.
What arguments, results and errors are is in `megatron_lowbit.kernels`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_lowbit.kernels.cells import cells
from megatron_lowbit.kernels.layout import row_bytes
from megatron_lowbit.kernels.triton import gathered as gathered
from megatron_lowbit.kernels.triton.launching import new_payload, sum_into
from megatron_lowbit.kernels.triton.parts import values as parts


@triton.jit
def _encode(
    partial,  # fp32, fp16 or the bits of BF16 [tokens, hidden]
    row_stride,
    column_stride,
    scale,  # fp32 [hidden]: the size of each feature
    body_index,  # int64 [BODY]
    bf16_index,  # int64 [kept]
    kept,
    payload,  # uint8 [tokens, row_bytes]
    row_bytes,
    center,  # fp32 [hidden], or None
    cells,  # int64 [CELLS]
    BODY: tl.constexpr,
    KEPT: tl.constexpr,  # a power of two, at least `kept`; or 0
    BODY_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    CELLS: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # offsets may pass 2**31
    partial += token * row_stride
    payload += token * row_bytes
    feature, inside = gathered.features(body_index, BODY, LOG_TILE)
    row = parts.load_floats(partial + feature * column_stride, inside)
    if center is not None:
        row -= tl.load(center + feature, mask=inside, other=0.0)
    row = tl.div_rn(row, tl.load(scale + feature, mask=inside, other=1.0))
    finite = 1
    if KEPT:
        finite = gathered.write_kept(
            partial, column_stride, bf16_index, kept, payload, BODY_BYTES, KEPT
        )
    # The tile may be longer than the power of two that the codec pads a body to: the zeros behind
    # it change no sum of squares.
    parts.write_body(
        row, finite, payload, kept, cells, BODY, BODY_BYTES, BITS, STEPS, CELLS, LOG_TILE
    )


@torch.library.custom_op("megatron_lowbit::scaled_encode", mutates_args=())
def encode(
    partial: Tensor,
    center: Tensor | None,
    scale: Tensor,
    body_index: Tensor,
    bf16_index: Tensor,
    thresholds: Tensor,
    bits: int,
    body_bytes: int,
) -> Tensor:
    """Write a partial into a payload.

    Args:
        scale: fp32 ``[hidden]``, contiguous: what each feature is divided by then.
        bits: 2 to 6.
    """
    search = cells(thresholds)
    return gathered.launch_encode(
        _encode,
        partial,
        row_bytes(body_bytes, bf16_index.numel() + 1),
        *(scale, body_index, bf16_index, center, search.table),
        BODY_BYTES=body_bytes,
        BITS=bits,
        STEPS=search.steps,
        CELLS=len(search.table),
    )


@encode.register_fake
def _(partial, center, scale, body_index, bf16_index, thresholds, bits, body_bytes):
    return new_payload(partial, partial.shape[0], row_bytes(body_bytes, bf16_index.numel() + 1))


def decode_sum(payloads: Tensor, *, out: Tensor | None = None, **tables) -> Tensor:
    """Sum the partials of all ranks from their payloads, in fp32 and in rank order."""
    out = sum_into(out, payloads, tables["scale"].shape[1])
    decode_sum_into(out, payloads, **tables)
    return out


@torch.library.custom_op("megatron_lowbit::scaled_decode_sum", mutates_args=("out",))
def decode_sum_into(
    out: Tensor,
    payloads: Tensor,
    center: Tensor | None,
    scale: Tensor,
    body_index: Tensor,
    bf16_index: Tensor,
    levels: Tensor,
    bits: int,
    body_bytes: int,
) -> None:
    """The op behind `decode_sum`.

    Args:
        scale: fp32 ``[at least ranks, hidden]``, contiguous.
        bits: 2 to 6.
    """
    gathered.launch_decode_sum(
        out,
        payloads,
        row_bytes(body_bytes, bf16_index.numel() + 1),
        center=center,
        scale=scale,
        body_index=body_index,
        bf16_index=bf16_index,
        levels=levels,
        bits=bits,
        body_bytes=body_bytes,
    )
