"""The peers' codecs in Triton: one program a token, one pass over its data.

One kernel each for encode and decode_sum serves every format (`grouped_kernels`). The bits
are those of `codecs.peers.group_frame`, the plain torch; only the bits of a NaN may differ. Bytes
moved a value in groups of 32 at 4 bits: encode 2 in and 0.5625 out; decode_sum 0.5625 in for each
rank and 2 out.
What arguments, results and errors are is in `megatron_lowbit.kernels`.
"""

import torch
from torch import Tensor

from megatron_lowbit.kernels.triton import grouped_kernels as kernels
from megatron_lowbit.kernels.triton.launching import (
    Tile,
    check_partial,
    check_payloads,
    check_sum,
    is_compiled,
    launch,
    new_payload,
    sum_into,
)
from megatron_lowbit.kernels.triton.parts.group_formats import SCALE_BYTES


def _constants(
    tile: Tile, hidden: int, format: str, group: int | None, bits: int, body_bytes: int
) -> dict:
    """What both programs are compiled for."""
    return {
        "HIDDEN": hidden,
        "GROUP": group or 1 << tile.log_tile,
        "FORMAT": format,
        "BITS": bits,
        "BODY_BYTES": body_bytes,
        "SCALE_BYTES": SCALE_BYTES[format],
    }


@torch.library.custom_op("megatron_lowbit::grouped_encode", mutates_args=())
def encode(
    partial: Tensor,
    hidden: int,
    format: str,
    group: int | None,
    bits: int,
    body_bytes: int,
    row_bytes: int,
) -> Tensor:
    """Write a partial into a payload.

    Args:
        format: One of `parts.group_formats`.
        group: Features that share numbers, a power of two; None for all features of a token.
        bits: Of a code, 2 to 8.
        body_bytes: Bytes of a row before the first number.
        row_bytes: Of a row.
    """
    tile, values = Tile.of(max(hidden, group or 0)), check_partial(partial, hidden)
    payload = new_payload(partial, len(partial), row_bytes)
    launch(
        kernels.encode,
        len(partial),
        tile,
        partial,
        *(values, *values.stride(), payload, row_bytes),
        **_constants(tile, hidden, format, group, bits, body_bytes),
    )
    return payload


@encode.register_fake
def _(partial, hidden, format, group, bits, body_bytes, row_bytes):
    return new_payload(partial, partial.shape[0], row_bytes)


def decode_sum(payloads: Tensor, *, out: Tensor | None = None, **layout) -> Tensor:
    """Sum the partials of all ranks from their payloads, in fp32 and in rank order."""
    out = sum_into(out, payloads, layout["hidden"])
    decode_sum_into(out, payloads, **layout)
    return out


@torch.library.custom_op("megatron_lowbit::grouped_decode_sum", mutates_args=("out",))
def decode_sum_into(
    out: Tensor,
    payloads: Tensor,
    hidden: int,
    format: str,
    group: int | None,
    bits: int,
    body_bytes: int,
    row_bytes: int,
) -> None:
    """The op behind `decode_sum`. Its arguments are those of `encode`."""
    tile = Tile.of(max(hidden, group or 0))
    payloads = check_payloads(payloads, row_bytes)
    ranks, tokens, _ = payloads.shape
    target = check_sum(out, tokens, hidden)
    launch(
        kernels.decode_sum,
        tokens,
        tile,
        payloads,
        *(payloads, *payloads.stride()[:2], ranks, target, *target.stride()),
        **_constants(tile, hidden, format, group, bits, body_bytes),
        NATIVE=is_compiled(kernels.decode_sum),
    )
