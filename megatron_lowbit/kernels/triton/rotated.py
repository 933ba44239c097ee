"""``rotated-hybrid`` and ``shaped-hybrid`` in Triton: one program a token, one pass over its data.

The bits are those of `codecs.rotated_hybrid`, its plain-torch code, and the functions those of the
C kernels; only the bits of a NaN in a sum may differ. Not so on the tensor cores, which the user
may have rotate (``MEGATRON_LOWBIT_ROTATION=tensor-cores``): see `parts.rotate`. Bytes moved a
value at 4 bits: encode 2 in and 0.5 out; decode_sum 0.5 in for each rank and 2 out; reduce_encode
0.5 in for each rank and 0.5 out. The tables, 4 bytes a feature each, stay in the caches.

Each is a `torch.library` op, which torch.compile and CUDA graphs take whole: no host
synchronisation, and nothing is allocated but the result.
What arguments, results and errors are is in `megatron_lowbit.kernels`.
"""

import torch
from torch import Tensor

from megatron_lowbit.kernels.layout import row_bytes
from megatron_lowbit.kernels.triton import rotated_kernels as kernels
from megatron_lowbit.kernels.triton.carrying import encode_with_carry as encode_with_carry
from megatron_lowbit.kernels.triton.carrying import (
    reduce_encode_with_carry as reduce_encode_with_carry,
)
from megatron_lowbit.kernels.triton.launching import (
    Tile,
    check_payloads,
    check_sum,
    dot_type,
    is_compiled,
    launch,
    new_payload,
    power_of_two,
    sum_into,
)
from megatron_lowbit.kernels.triton.rotated_launching import launch_encode, launch_reduce

_TRIAL = torch.tensor([-1.0, 0.0, 1.0])


@torch.library.custom_op("megatron_lowbit::rotated_encode", mutates_args=())
def encode(
    partial: Tensor,
    width: int,
    center: Tensor | None,
    scale: Tensor,
    bf16_index: Tensor,
    block: int,
    thresholds: Tensor,
    bits: int,
    body_bytes: int,
) -> Tensor:
    """Write a partial into a payload."""
    encoding = (center, scale, bf16_index, block, thresholds, bits, body_bytes)
    return launch_encode(partial, width, *encoding)


@encode.register_fake
def _(partial, width, center, scale, bf16_index, block, thresholds, bits, body_bytes):
    row = row_bytes(body_bytes, bf16_index.numel() + 1)
    return new_payload(partial, partial.shape[0], row)


def decode_sum(payloads: Tensor, *, out: Tensor | None = None, **tables) -> Tensor:
    """Sum the partials of all ranks from their payloads, in fp32 and in rank order."""
    out = sum_into(out, payloads, tables["scale"].numel())
    decode_sum_into(out, payloads, **tables)
    return out


@torch.library.custom_op("megatron_lowbit::rotated_decode_sum", mutates_args=("out",))
def decode_sum_into(
    out: Tensor,
    payloads: Tensor,
    center: Tensor | None,
    scale: Tensor,
    bf16_index: Tensor,
    block: int,
    levels: Tensor,
    bits: int,
    body_bytes: int,
) -> None:
    """The op behind `decode_sum`."""
    hidden, kept = scale.numel(), bf16_index.numel()
    tile = Tile.of(hidden)
    payloads = check_payloads(payloads, row_bytes(body_bytes, kept + 1))
    ranks, tokens, _ = payloads.shape
    target = check_sum(out, tokens, hidden)
    received = (payloads, *payloads.stride()[:2], ranks)
    tables = (center, scale, bf16_index, kept, levels)
    launch(
        kernels.decode_sum,
        tokens,
        tile,
        payloads,
        *received,
        *tables,
        target,
        *target.stride(),
        HIDDEN=hidden,
        LOG_BLOCK=block.bit_length() - 1,
        KEPT=power_of_two(kept),
        BODY_BYTES=body_bytes,
        BITS=bits,
        NATIVE=is_compiled(kernels.decode_sum),
        DOT=dot_type(kernels.decode_sum),
        token=None,
    )


@torch.library.custom_op("megatron_lowbit::rotated_reduce_encode", mutates_args=())
def reduce_encode(
    payloads: Tensor,
    hidden: int,
    kept: int,
    levels: Tensor,
    bits: int,
    body_bytes: int,
    thresholds: Tensor,
    sum_bits: int,
    sum_body_bytes: int,
) -> Tensor:
    """Sum the partials of all ranks and write the sum into a payload, without turning it back."""
    received, written = (levels, bits, body_bytes), (thresholds, sum_bits, sum_body_bytes)
    return launch_reduce(payloads, hidden, kept, *received, *written)


@reduce_encode.register_fake
def _(payloads, hidden, kept, levels, bits, body_bytes, thresholds, sum_bits, sum_body_bytes):
    return new_payload(payloads, payloads.shape[1], row_bytes(sum_body_bytes, kept + 1))


def try_out(device: str) -> None:
    """Run the smallest encode and look at its result.

    Raises:
        Exception: Whatever Triton, its compilers or the driver raise; RuntimeError on other bytes
            than a row of zeros must give.
    """
    payload = encode(
        torch.zeros(1, 256, device=device),  # as few as go to the tensor cores
        width=256,
        center=None,
        scale=torch.ones(256, device=device),
        bf16_index=torch.empty(0, dtype=torch.int64, device=device),
        block=256,
        thresholds=_TRIAL.to(device),
        bits=2,
        body_bytes=64,
    )
    if payload.tolist() != [[0x55] * 64 + [0, 0]]:  # 0 is above one threshold: codes 1, scale 0
        raise RuntimeError(f"a row of zeros became {payload.tolist()}")
