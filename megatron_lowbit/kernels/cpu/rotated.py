"""``rotated-hybrid`` on CPUs: tensors in, tensors out, the work in ``rotated_hybrid.c``.

The bits are those of `codecs.rotated_hybrid`, its plain-torch code; only the bits of a NaN may
differ (here always 0xffff in a payload, as torch on x86 with AVX2 writes it). Rows are independent:
where there is enough work they are split over `torch.get_num_threads()` threads, which ctypes lets
run at once. Nothing here is recorded by autograd.

512 x 4096 bf16 at 4 bits on one thread of an AMD EPYC with AVX-512, in ns a value (plain torch in
brackets): encode 0.52 (26), decode and sum 4 payloads 0.55 (33), sum and encode 4 payloads 0.46
(47).
A call costs about 10 us before the first value.
"""

import torch
from torch import Tensor

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels.cpu.calls import DTYPES, function, pointer, readable, run_rows
from megatron_lowbit.kernels.cpu.carrying import encode_with_carry as encode_with_carry
from megatron_lowbit.kernels.layout import row_bytes


def encode(
    partial: Tensor,
    *,
    width: int,
    center: Tensor | None,
    scale: Tensor,
    bf16_index: Tensor,
    block: int,
    thresholds: Tensor,
    bits: int,
    body_bytes: int,
) -> Tensor:
    """Write a partial into a payload.

    Args:
        partial: Floating point ``[tokens, width]``, any strides.
        width: Hidden size, or k more with a body that the weight has rotated (`codecs.folding`).
        center: fp32 ``[hidden]``, contiguous: subtracted first; nothing is if None.
        scale: fp32 ``[hidden]``, contiguous: what each feature is multiplied by then.
        bf16_index: int64 ``[k]``, contiguous, each in ``[0, width)``.
        block: Values that the rotation mixes, a power of two that divides hidden.
        thresholds: fp32 ``[2**bits - 1]``, ascending.
        bits: 1 to 6.
        body_bytes: Bytes of the packed codes of a row.

    Returns:
        ``uint8 [tokens, row_bytes]``, contiguous.

    Raises:
        LowbitError: `partial` is not ``[tokens, width]``.
    """
    hidden, kept = scale.numel(), bf16_index.numel()
    partial = readable(partial, width)
    tokens = len(partial)
    payload = torch.empty((tokens, row_bytes(body_bytes, kept + 1)), dtype=torch.uint8)
    call = function("encode")
    source, stride = partial.data_ptr(), partial.stride(0) * partial.element_size()
    target, row = payload.data_ptr(), payload.shape[1]
    settings = (hidden, block, pointer(center), scale.data_ptr(), bf16_index.data_ptr(), kept)
    more = (thresholds.data_ptr(), bits, body_bytes)
    dtype = DTYPES[partial.dtype]

    def part(first: int, last: int) -> int:
        begin = source + first * stride
        end = target + first * row
        return call(begin, dtype, stride, last - first, *settings, *more, end)

    run_rows(part, tokens, hidden)
    return payload


def decode_sum(
    payloads: Tensor,
    *,
    center: Tensor | None,
    scale: Tensor,
    bf16_index: Tensor,
    block: int,
    levels: Tensor,
    bits: int,
    body_bytes: int,
    out: Tensor | None = None,
) -> Tensor:
    """Sum the partials of all ranks from their payloads, in fp32 and in rank order.

    Args:
        payloads: ``uint8 [ranks, tokens, row_bytes]``.
        center: fp32 ``[hidden]``, contiguous: added last; nothing is if None.
        scale: fp32 ``[hidden]``, contiguous: what each feature is multiplied by before.
        bf16_index: int64 ``[k]``, contiguous, each in ``[0, hidden)``.
        block: Values that the rotation mixes.
        levels: fp32 ``[2**bits]``, ascending.
        bits: 1 to 6.
        body_bytes: Bytes of the packed codes of a row.
        out: Floating point ``[tokens, hidden]`` that the sum is rounded into; a new fp32 tensor if
            left out.

    Returns:
        `out`.

    Raises:
        LowbitError: `payloads` has another shape or type.
    """
    hidden, kept = scale.numel(), bf16_index.numel()
    payloads = _check_payloads(payloads, row_bytes(body_bytes, kept + 1))
    ranks, tokens, row = payloads.shape
    if out is not None and _writable(out, tokens, hidden):
        total = out
    else:
        total = torch.empty((tokens, hidden), dtype=torch.float32)
    call = function("decode_sum")
    source, rank_stride = payloads.data_ptr(), payloads.stride(0)
    target, stride = total.data_ptr(), total.stride(0) * total.element_size()
    settings = (hidden, block, pointer(center), scale.data_ptr(), bf16_index.data_ptr(), kept)
    more = (levels.data_ptr(), bits, body_bytes)
    dtype = DTYPES[total.dtype]

    def part(first: int, last: int) -> int:
        begin, end = source + first * row, target + first * stride
        count = last - first
        return call(begin, rank_stride, ranks, count, *settings, *more, end, dtype, stride)

    run_rows(part, tokens, hidden * ranks)
    return total if out is None or out is total else out.copy_(total)


def reduce_encode(
    payloads: Tensor,
    *,
    hidden: int,
    kept: int,
    levels: Tensor,
    bits: int,
    body_bytes: int,
    thresholds: Tensor,
    sum_bits: int,
    sum_body_bytes: int,
) -> Tensor:
    """Sum the partials of all ranks and write the sum into a payload, without turning it back.

    Args:
        payloads: ``uint8 [ranks, tokens, row_bytes]``.
        hidden: Features in a token.
        kept: Features that travel in BF16.
        levels: fp32 ``[2**bits]``, ascending.
        bits: Of a value in `payloads`, 1 to 6.
        body_bytes: Bytes of the packed codes of a row in `payloads`.
        thresholds: fp32 ``[2**sum_bits - 1]``, ascending.
        sum_bits: Of a value in the result, 1 to 6.
        sum_body_bytes: Bytes of the packed codes of a row in the result.

    Returns:
        ``uint8 [tokens, row_bytes at sum_bits]``, contiguous.

    Raises:
        LowbitError: `payloads` has another shape or type.
    """
    payloads = _check_payloads(payloads, row_bytes(body_bytes, kept + 1))
    ranks, tokens, row = payloads.shape
    payload = torch.empty((tokens, row_bytes(sum_body_bytes, kept + 1)), dtype=torch.uint8)
    call = function("reduce_encode")
    source, rank_stride = payloads.data_ptr(), payloads.stride(0)
    target, sum_row = payload.data_ptr(), payload.shape[1]
    settings = (hidden, kept, levels.data_ptr(), bits, body_bytes)
    more = (thresholds.data_ptr(), sum_bits, sum_body_bytes)

    def part(first: int, last: int) -> int:
        begin, end = source + first * row, target + first * sum_row
        return call(begin, rank_stride, ranks, last - first, *settings, *more, end)

    run_rows(part, tokens, hidden * ranks)
    return payload


def _check_payloads(payloads: Tensor, row_bytes: int) -> Tensor:
    """The payloads with the rows of a rank side by side; the ranks may lie anywhere."""
    shape = payloads.shape
    if payloads.dtype != torch.uint8 or len(shape) != 3 or shape[2] != row_bytes or not shape[0]:
        wanted = f"uint8 [ranks, tokens, {row_bytes}]"
        raise LowbitError(f"payloads are {wanted}, got {payloads.dtype} {list(shape)}")
    together = payloads.stride(2) == 1 and payloads.stride(1) == row_bytes
    return payloads if together else payloads.contiguous()


def _writable(out: Tensor, tokens: int, hidden: int) -> bool:
    """Whether C can write the sum where it belongs."""
    placed = out.is_cpu and out.shape == (tokens, hidden) and out.dtype in DTYPES
    return placed and out.stride(1) == 1 and (out.stride(0) >= hidden or tokens < 2)
