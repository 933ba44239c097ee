"""``rotated-hybrid`` on CPUs: tensors in, tensors out, the work in ``rotated_hybrid.c``.

The bits are those of `codecs.rotated_hybrid`, its plain-torch code; only the bits of a NaN may
differ (here always 0xffff in a payload, as torch on x86 with AVX2 writes it). Rows are independent:
where there is enough work they are split over `torch.get_num_threads()` threads, which ctypes lets
run at once. Nothing here is recorded by autograd.

512 x 4096 bf16 at 4 bits on one thread of an AMD EPYC with AVX-512, in ns a value (plain torch in
brackets): encode 0.52 (26), decode and sum 4 payloads 0.55 (33), sum and encode 4 payloads 0.46
(47).
A call costs about 10 us before the first value.
What arguments, results and errors are is in `megatron_lowbit.kernels`.
"""

import torch
from torch import Tensor

from megatron_lowbit.kernels.cpu.calls import (
    DTYPES,
    check_payloads,
    function,
    pointer,
    readable,
    run_rows,
    takes_rows,
)
from megatron_lowbit.kernels.cpu.carrying import encode_with_carry as encode_with_carry
from megatron_lowbit.kernels.cpu.carrying import (
    reduce_encode_with_carry as reduce_encode_with_carry,
)
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
    """Write a partial into a payload."""
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
    """Sum the partials of all ranks from their payloads, in fp32 and in rank order."""
    hidden, kept = scale.numel(), bf16_index.numel()
    payloads = check_payloads(payloads, row_bytes(body_bytes, kept + 1))
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
    """Sum the partials of all ranks and write the sum into a payload, without turning it back."""
    payloads = check_payloads(payloads, row_bytes(body_bytes, kept + 1))
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


def _writable(out: Tensor, tokens: int, hidden: int) -> bool:
    """Whether C can write the sum where it belongs."""
    placed = out.is_cpu and out.shape == (tokens, hidden) and out.dtype in DTYPES
    return placed and takes_rows(out)
