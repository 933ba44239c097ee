"""The launches that `rotated` and `carrying` share: the kernels' arguments, in one place.

Without a carry, which is `taken`, `given`, `bounded` and `largest`, a kernel gets none of what only
a carry needs. Arguments are those of the public functions, which say what they are and check
nothing themselves.
"""

from torch import Tensor

from megatron_lowbit.kernels.cells import cells
from megatron_lowbit.kernels.layout import row_bytes
from megatron_lowbit.kernels.triton import rotated_kernels as kernels
from megatron_lowbit.kernels.triton.launching import (
    NO_CARRY,
    Tile,
    carry_arguments,
    check_partial,
    check_payloads,
    dot_type,
    is_compiled,
    launch,
    new_payload,
    power_of_two,
)


def launch_encode(
    partial: Tensor,
    width: int,
    center: Tensor | None,
    scale: Tensor,
    bf16_index: Tensor,
    block: int,
    thresholds: Tensor,
    bits: int,
    body_bytes: int,
    carry: tuple = NO_CARRY,
    decode_scale: Tensor | None = None,
    levels: Tensor | None = None,
) -> Tensor:
    """`rotated.encode`, or `carrying.encode_with_carry`: the payload."""
    hidden, kept = scale.numel(), bf16_index.numel()
    tile, search = Tile.of(hidden), cells(thresholds)
    values = check_partial(partial, width)
    payload = new_payload(partial, len(partial), row_bytes(body_bytes, kept + 1))
    carried = carry_arguments(len(partial), hidden, *carry)
    launch(
        kernels.encode,
        len(partial),
        tile,
        partial,
        *(values, *values.stride(), *carried, center, scale, decode_scale),
        *(bf16_index, kept, search.table, levels, payload, payload.shape[1]),
        HIDDEN=hidden,
        LOG_BLOCK=block.bit_length() - 1,
        KEPT=power_of_two(kept),
        BODY_BYTES=body_bytes,
        BITS=bits,
        STEPS=search.steps,
        CELLS=len(search.table),
        NATIVE=is_compiled(kernels.encode),
        DOT=dot_type(kernels.encode),
        token=None,
    )
    return payload


def launch_reduce(
    payloads: Tensor,
    hidden: int,
    kept: int,
    levels: Tensor,
    bits: int,
    body_bytes: int,
    thresholds: Tensor,
    sum_bits: int,
    sum_body_bytes: int,
    center: Tensor | None = None,
    scale: Tensor | None = None,
    bf16_index: Tensor | None = None,
    block: int = 1,
    carry: tuple = NO_CARRY,
    decode_scale: Tensor | None = None,
    sum_levels: Tensor | None = None,
) -> Tensor:
    """`rotated.reduce_encode`, or `carrying.reduce_encode_with_carry`: the payload.

    The sum is turned back for a carry only: without one it needs nothing from `center` on.
    """
    tile, search = Tile.of(hidden), cells(thresholds)
    payloads = check_payloads(payloads, row_bytes(body_bytes, kept + 1))
    ranks, tokens, _ = payloads.shape
    payload = new_payload(payloads, tokens, row_bytes(sum_body_bytes, kept + 1))
    carried = carry_arguments(tokens, hidden, *carry)
    launch(
        kernels.reduce_encode,
        tokens,
        tile,
        payloads,
        *(payloads, *payloads.stride()[:2], ranks, *carried),
        *(center, scale, decode_scale, bf16_index, kept, levels, search.table),
        *(sum_levels, payload, payload.shape[1]),
        HIDDEN=hidden,
        LOG_BLOCK=block.bit_length() - 1,
        KEPT=power_of_two(kept),
        BODY_BYTES=body_bytes,
        BITS=bits,
        SUM_BODY_BYTES=sum_body_bytes,
        SUM_BITS=sum_bits,
        STEPS=search.steps,
        CELLS=len(search.table),
        NATIVE=is_compiled(kernels.reduce_encode),
        DOT="" if decode_scale is None else dot_type(kernels.reduce_encode),
        token=None,
    )
    return payload
