"""``static-hybrid``: the paper's method (arXiv:2411.07942, section 3).

The features of the BF16 index travel in BF16, all others as signed int4 with one calibrated scale
per sync point, rank and feature: absmax / 7, where absmax is half the calibrated range. Nothing
but values is on the wire: scales and index are known to all ranks. The sum over ranks, where a
collective sends it, has calibrated ranges of its own.

The codes are -7 to 7 (at 6 bits -31 to 31). The one left over, -8 (-32), marks a NaN or an
infinity, so that a row without any float still keeps the contract on non-finite values. A value
outside the calibrated range clips.

The plain torch in the methods that begin with ``_reference`` is the specification; on GPUs
`kernels.triton.static` gives the same bits.
"""

from types import ModuleType

import torch
from torch import Tensor

from megatron_lowbit.codecs import kernel_arguments, wire
from megatron_lowbit.codecs.base import Codec, rounded_into
from megatron_lowbit.codecs.tables import (
    Statistics,
    Tables,
    check_by_rank,
    check_index,
    other_features,
    put_in_place,
    sum_in_rank_order,
)
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels import select


def _largest(bits: int) -> int:
    """The largest code, 7 at 4 bits; the one below its negative marks what is not finite."""
    return (1 << (bits - 1)) - 1


class StaticHybrid(Codec):
    """4 bits a value and 12 more for each BF16 feature: 4 + 12/64 = 4.19 by default."""

    name = "static-hybrid"
    supported_bits = (4, 3, 5, 6, 8)
    needs_statistics = True

    def default_bf16_features(self, hidden: int) -> int:
        return hidden // 64

    def tables(self, hidden, *, bf16_index=None, statistics=None, device=None) -> Tables:
        ranges = statistics.ranges if statistics else None
        if ranges is None:
            raise LowbitError(
                "static-hybrid needs calibrated ranges: take them from a calibration index (python "
                "-m megatron_lowbit calibrate makes one), or use rotated-hybrid, which needs none"
            )
        check_by_rank("ranges", ranges, hidden)
        device = device or ranges.device
        index = check_index(bf16_index, hidden, device)
        of_sum = None
        if statistics.sum_ranges is not None:
            of_sum = self.for_sum().tables(
                hidden,
                bf16_index=index,
                statistics=Statistics(ranges=statistics.sum_ranges.view(1, -1)),
                device=device,
            )
        return Tables(
            codec=self.name,
            hidden=hidden,
            bf16_index=index,
            body_index=other_features(index, hidden),
            scale=(ranges.float() / (2 * _largest(self.bits))).to(device),
            of_sum=of_sum,
        )

    def row_bytes(self, tables: Tables) -> int:
        kept = tables.bf16_index.numel()
        return wire.row_bytes(wire.packed_bytes(tables.hidden - kept, self.bits), kept)

    def encode(self, partial: Tensor, tables: Tables, *, rank: int = 0) -> Tensor:
        module = self.kernels(partial, tables)
        if module is None:
            return self._reference_encode(partial, tables, rank)
        layout = kernel_arguments.apart(tables, self.bits)
        return module.encode(partial, scale=tables.scale[rank], **layout)

    def decode_sum(self, payloads: Tensor, tables: Tables, *, out: Tensor | None = None) -> Tensor:
        module = self.kernels(payloads, tables)
        if module is None:
            return rounded_into(out, self._reference_decode_sum(payloads, tables))
        layout = kernel_arguments.apart(tables, self.bits)
        return module.decode_sum(payloads, out=out, scale=tables.scale, **layout)

    def kernels(self, values: Tensor, tables: Tables) -> ModuleType | None:
        return select.kernels_for(select.STATIC, values, tables.scale)

    def _reference_encode(self, partial: Tensor, tables: Tables, rank: int) -> Tensor:
        body = tables.body_index
        values = partial[:, body].float()
        scale = tables.scale[rank, body]
        # A feature that was always zero has a zero scale: it travels as zero.
        step = torch.where(scale > 0, 1 / scale, 0)
        largest = _largest(self.bits)
        codes = (values * step).round().clamp(-largest, largest)
        codes = torch.where(values.isfinite(), codes, -largest - 1).to(torch.int32)
        packed = wire.pack(codes & ((1 << self.bits) - 1), self.bits)
        return wire.join_row(packed, wire.to_wire_bf16(partial[:, tables.bf16_index]))

    def _reference_decode_sum(self, payloads: Tensor, tables: Tables) -> Tensor:
        body = tables.body_index
        packed, kept = wire.split_row(payloads, wire.packed_bytes(body.numel(), self.bits))
        values = _values_of_codes(self.bits, payloads.device)
        total = None
        for rank, codes in enumerate(packed):  # one rank at a time: no [ranks, tokens, hidden] fp32
            levels = values[wire.unpack(codes, self.bits, body.numel())]
            levels *= tables.scale[rank, body]
            total = levels if total is None else total.add_(levels)
        assert total is not None, "a group has ranks"
        return put_in_place(total, sum_in_rank_order(kept), tables)


def _values_of_codes(bits: int, device: torch.device) -> Tensor:
    """fp32 ``[2**bits]``; at 4 bits 0 to 7, then the mark of what is not finite, then -7 to -1."""
    half = 1 << (bits - 1)
    values = torch.arange(2.0 * half, device=device)
    values[half:] -= 2 * half
    values[half] = torch.nan
    return values
