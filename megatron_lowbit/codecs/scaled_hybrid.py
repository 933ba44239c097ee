"""``scaled-hybrid``: BF16 outliers apart, the rest evened out by calibrated scales, not rotated.

Encode, for each token: leave out the features of the BF16 index; subtract each other feature's
calibrated mean on this rank and divide by its calibrated standard deviation there; divide by the
row's own root mean square, kept as one BF16 number; replace each value by the nearest of 2**bits
Gaussian-optimal levels (`codecs.codebook`). Every feature then has the codebook's signal to noise
ratio, so that a large one costs the others nothing: what rotation is for elsewhere, with fewer
operations. What it lacks is what rotation gives besides: features of a trained model have heavier
tails than a Gaussian, and here they meet the codebook as they are.

Centring is free on the wire; with it the error at the 60 sync points of SmolLM2-135M (TP 3, 4 bits)
is 0.9 dB less, on the geometric mean, than with the raw root mean square and no centring.

The tables belong to ranks, so an index serves its own TP degree only. A sum over ranks that is sent
(two-shot) has tables of its own, from the variance and the mean of the sum.

The plain torch in the methods that begin with ``_reference`` is the specification; on GPUs
`kernels.triton.scaled` gives the same bits.
"""

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from megatron_lowbit.codecs import codebook, kernel_arguments, variance, wire
from megatron_lowbit.codecs.base import Codec, rounded_into
from megatron_lowbit.codecs.rotation import token_scale
from megatron_lowbit.codecs.tables import (
    Statistics,
    Tables,
    check_index,
    other_features,
    put_in_place,
    sum_in_rank_order,
)
from megatron_lowbit.kernels import select


class ScaledHybrid(Codec):
    """`bits` bits a value, 16 for each BF16 feature instead, and 16 for the scale of a token."""

    name = "scaled-hybrid"
    supported_bits = (4, 3, 2, 5, 6)
    needs_statistics = True
    carries = True

    def default_bf16_features(self, hidden: int) -> int:
        return hidden // 64

    def tables(self, hidden, *, bf16_index=None, statistics=None, device=None) -> Tables:
        known = variance.calibrated(statistics, hidden, self.name)
        device = device or known.device
        index = check_index(bf16_index, hidden, device)
        body = other_features(index, hidden)
        tables = Tables(
            codec=self.name,
            hidden=hidden,
            bf16_index=index,
            body_index=body,
            scale=variance.relative(known, body.to(known.device), 0.5).sqrt().to(device),
        )
        center = center_sum = None
        if statistics.mean is not None:
            center = statistics.mean.float().to(device)
            center_sum = sum_in_rank_order(center)
            tables = replace(tables, center=center, center_sum=center_sum)
        if statistics.sum_variance is None:
            return tables
        sums = Statistics(
            variance=statistics.sum_variance.view(1, -1),
            mean=None if center_sum is None else center_sum.view(1, -1),
        )
        of_sum = self.for_sum().tables(hidden, bf16_index=index, statistics=sums, device=device)
        return replace(tables, of_sum=of_sum)

    def row_bytes(self, tables: Tables) -> int:
        body = wire.packed_bytes(tables.body_index.numel(), self.bits)
        return wire.row_bytes(body, tables.bf16_index.numel() + 1)

    def encode(self, partial: Tensor, tables: Tables, *, rank: int = 0) -> Tensor:
        module = self.kernels(partial, tables)
        if module is None:
            return self._reference_encode(partial, tables, rank)
        return module.encode(
            partial,
            center=None if tables.center is None else tables.center[rank],
            scale=tables.scale[rank],
            thresholds=codebook.thresholds(self.bits, partial.device),
            **kernel_arguments.apart(tables, self.bits),
        )

    def decode_sum(self, payloads: Tensor, tables: Tables, *, out: Tensor | None = None) -> Tensor:
        module = self.kernels(payloads, tables)
        if module is None:
            return rounded_into(out, self._reference_decode_sum(payloads, tables))
        return module.decode_sum(
            payloads,
            out=out,
            center=tables.center_sum,
            scale=tables.scale,
            levels=codebook.levels(self.bits, payloads.device),
            **kernel_arguments.apart(tables, self.bits),
        )

    def kernels(self, values: Tensor, tables: Tables) -> ModuleType | None:
        return select.kernels_for(select.SCALED, values, tables.scale)

    def _reference_encode(self, partial: Tensor, tables: Tables, rank: int) -> Tensor:
        body = tables.body_index
        kept = wire.to_wire_bf16(partial[:, tables.bf16_index])
        values = partial[:, body].float()
        if tables.center is not None:
            values = values - tables.center[rank, body]
        values = values / tables.scale[rank, body]
        scale = token_scale(values, kept)
        inverse = torch.where(scale == 0, 0, 1 / scale.float())
        codes = codebook.quantize(values * inverse, self.bits)
        return wire.join_row(wire.pack(codes, self.bits), torch.cat([kept, scale], dim=1))

    def _reference_decode_sum(self, payloads: Tensor, tables: Tables) -> Tensor:
        body = tables.body_index
        packed, floats = wire.split_row(payloads, wire.packed_bytes(body.numel(), self.bits))
        kept, scale = floats[..., :-1], floats[..., -1:]
        total = None
        for rank, codes in enumerate(packed):  # one rank at a time: no [ranks, tokens, hidden] fp32
            values = codebook.dequantize(wire.unpack(codes, self.bits, body.numel()), self.bits)
            values *= scale[rank]
            values *= tables.scale[rank, body]
            total = values if total is None else total.add_(values)
        assert total is not None, "a group has ranks"
        if tables.center_sum is not None:
            total += tables.center_sum[body]
        return put_in_place(total, sum_in_rank_order(kept), tables)
