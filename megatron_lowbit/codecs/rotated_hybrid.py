"""``rotated-hybrid``: BF16 outliers apart, the rest rotated and put in a Gaussian codebook.

Encode, for each token: set the features of the BF16 index to zero; multiply by fixed signs and
apply a block Hadamard transform (`codecs.rotation`), after which a row is close to Gaussian; divide
by the row's own root mean square, kept as one BF16 number; replace each value by the nearest of
2**bits Gaussian-optimal levels (`codecs.codebook`). Nothing is static but the index, so nothing
clips and no table depends on the TP degree. The transform is linear and the same on all ranks:
the sum is taken, and where a collective sends it quantized again, in the rotated domain, and turned
back once.

Special cases: 1 bit is the sign, 0 bits send nothing: the sum is then the calibrated mean, and the
error feedback of `codecs.carry` sends the rest later. An empty BF16 index quantizes every feature;
`rotate=False` leaves signs and transform out. The squares are summed in fp32: a row whose RMS is
above 2**64 / sqrt(block * hidden) (2**51 at hidden 8192) gives NaN, one below about 2**-75 may give
zero.

The plain torch in the methods that begin with ``_reference`` is the specification. Kernels give the
same bits: on CPUs `kernels.cpu.rotated`, about 50 times faster (512 x 4096 on one thread of an
AMD EPYC), on GPUs `kernels.triton.rotated`, unless the user has these rotate on tensor cores.
"""

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from megatron_lowbit.codecs import codebook, kernel_arguments, rotation, wire
from megatron_lowbit.codecs.base import Codec, rounded_into
from megatron_lowbit.codecs.carry import NO_CARRY, Carry
from megatron_lowbit.codecs.tables import Tables, check_index, sum_in_rank_order
from megatron_lowbit.kernels import select
from megatron_lowbit.kernels.peer_memory import PeerMemory


class RotatedHybrid(Codec):
    """`bits` bits a value, 16 more for each BF16 feature, and 16 for the scale of a token."""

    name = "rotated-hybrid"
    supported_bits: tuple[int, ...] = (4, 3, 2, 5, 6, 1)
    carries = can_skip = True

    def __init__(
        self, bits: int | None = None, *, sum_bits: int | None = None, rotate: bool = True
    ):
        super().__init__(bits, sum_bits=sum_bits)
        self.rotate = rotate

    @property
    def takes_symmetric_memory(self) -> bool:
        return self.rotate and self.bits > 0

    def default_bf16_features(self, hidden: int) -> int:
        return hidden // 128

    def tables(self, hidden, *, bf16_index=None, statistics=None, device=None) -> Tables:
        device = device or (bf16_index.device if bf16_index is not None else "cpu")
        signs = rotation.signs(hidden) if self.rotate else torch.ones(hidden)
        block = rotation.block_size(hidden) if self.rotate else 1
        index = check_index(bf16_index, hidden, device)
        return Tables(
            codec=self.name,
            hidden=hidden,
            bf16_index=index,
            encode_scale=signs.to(device).index_fill(0, index, 0),
            decode_scale=(signs / block).to(device).index_fill(0, index, 0),
        )

    def sum_tables(self, tables: Tables) -> Tables:
        """Those of the partials, but that the mean of the sum is what is subtracted from it."""
        if tables.center is None or tables.center_sum is None:
            return tables
        return replace(tables, center=tables.center_sum[None])

    def row_bytes(self, tables: Tables) -> int:
        if self.bits == 0:
            return 0
        body = self._body_bytes(tables.hidden)
        return wire.row_bytes(body, tables.bf16_index.numel() + 1)

    def encode(self, partial: Tensor, tables: Tables, *, rank: int = 0) -> Tensor:
        if self.bits == 0:
            return partial.new_empty((len(partial), 0), dtype=torch.uint8)
        module = self.kernels(partial, tables)
        if module is None:
            return self._reference_encode(partial, tables, rank)
        return module.encode(partial, **kernel_arguments.encoding(tables, rank, self.bits))

    def encode_with_carry(
        self, partial: Tensor, tables: Tables, carry: Carry, *, rank: int = 0
    ) -> Tensor:
        module = self._carrying("encode_with_carry", partial, tables, carry)
        if module is None:
            return super().encode_with_carry(partial, tables, carry, rank=rank)
        return module.encode_with_carry(
            partial,
            **kernel_arguments.carried(carry),
            decode_scale=tables.decode_scale,
            levels=codebook.levels(self.bits, tables.decode_scale.device),
            **kernel_arguments.encoding(tables, rank, self.bits),
        )

    def decode_sum(self, payloads: Tensor, tables: Tables, *, out: Tensor | None = None) -> Tensor:
        module = self.kernels(payloads, tables)
        if module is None or self.bits == 0:
            return rounded_into(out, self._reference_decode_sum(payloads, tables))
        return module.decode_sum(payloads, out=out, **kernel_arguments.decoding(tables, self.bits))

    def reduce_encode(self, payloads: Tensor, tables: Tables) -> Tensor:
        module = self.kernels(payloads, tables)
        if module is None:
            return self._reference_reduce_encode(payloads, tables)
        return module.reduce_encode(
            payloads, **kernel_arguments.reduction(tables, self.bits, self.sum_bits)
        )

    def reduce_encode_with_carry(self, payloads: Tensor, tables: Tables, carry: Carry) -> Tensor:
        module = self._carrying("reduce_encode_with_carry", payloads, tables, carry)
        if module is None:
            return super().reduce_encode_with_carry(payloads, tables, carry)
        return module.reduce_encode_with_carry(
            payloads,
            **kernel_arguments.carried(carry),
            **kernel_arguments.carried_reduction(tables, self.bits, self.sum_bits),
        )

    def all_reduce_in(
        self,
        memory: PeerMemory,
        partial: Tensor,
        tables: Tables,
        *,
        chunk: int,
        out: Tensor,
        carry: Carry = NO_CARRY,
        of_sum: Carry = NO_CARRY,
        trap: bool = True,
    ) -> None:
        module, encode = (
            select.symmetric(),
            kernel_arguments.encoding(tables, memory.rank, self.bits),
        )
        call = {"encode": encode, "carry": kernel_arguments.carried(carry), "trap": trap}
        if not chunk:
            decode = kernel_arguments.decoding(tables, self.bits)
            module.one_shot(memory, partial, out, decode=decode, **call)
            return
        module.two_shot(
            memory,
            partial,
            out,
            reduce=kernel_arguments.reduction(tables, self.bits, self.sum_bits),
            decode=kernel_arguments.decoding(self.sum_tables(tables), self.sum_bits),
            of_sum=kernel_arguments.carried(of_sum),
            chunk=chunk,
            **call,
        )

    def decode_sum_norm(
        self,
        payloads: Tensor,
        tables: Tables,
        *,
        weight: Tensor,
        epsilon: float,
        residual: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`decode_sum`, then bias and residual, then RMSNorm; on a GPU in one pass.

        A public interface, for layers that can hand over their norm: Megatron's cannot, so nothing
        in this package calls it.

        Everything is fp32 up to the end. The squares of the body are summed by the pairwise tree of
        `rotation.sum_of_squares`, those of the BF16 features by one of their own, added last.

        Args:
            payloads: ``uint8 [ranks, tokens, row_bytes]``.
            tables: Of this sync point.
            weight: Floating point ``[hidden]``: RMSNorm's.
            epsilon: RMSNorm's.
            residual: Floating point ``[tokens, hidden]``.
            bias: Floating point ``[hidden]``.

        Returns:
            What is normalized and what it was before, both ``[tokens, hidden]`` in the type of
            `weight`.
        """
        module = self.kernels(payloads, tables, family=select.NORM)
        if module is None:
            total = self._reference_decode_sum(payloads, tables)
            return rotation.sum_norm(total, tables.bf16_index, weight, epsilon, residual, bias)
        return module.decode_sum_norm(
            payloads,
            weight,
            epsilon,
            residual,
            bias,
            **kernel_arguments.decoding(tables, self.bits),
        )

    def kernels(
        self, values: Tensor, tables: Tables, *, family: str = select.ROTATED
    ) -> ModuleType | None:
        if not self.rotate or not self.bits:
            return None
        return select.kernels_for(family, values, tables.encode_scale)

    def _carrying(
        self, function: str, values: Tensor, tables: Tables, carry: Carry
    ) -> ModuleType | None:
        """The module of kernels, if it has `function` and there is an error to keep."""
        module = None if carry.given is None else self.kernels(values, tables)
        return module if hasattr(module, function) else None

    def _reference_encode(self, partial: Tensor, tables: Tables, rank: int) -> Tensor:
        folded = tables.folded_index is not None
        index = tables.folded_index if folded else tables.bf16_index
        kept = wire.to_wire_bf16(partial[:, index])
        body = partial[:, : tables.hidden].float()
        if tables.center is not None:
            body = body - tables.center[rank]
        if folded:
            return self._write(body, kept)
        body = body * tables.encode_scale
        body[:, tables.bf16_index] = 0
        return self._write(self._transform(body), kept)

    def _reference_decode_sum(self, payloads: Tensor, tables: Tables) -> Tensor:
        if self.bits == 0:
            zeros = tables.decode_scale.new_zeros(payloads.shape[1], tables.hidden)
            return zeros if tables.center_sum is None else zeros + tables.center_sum
        total, kept = self._sum(payloads, tables)
        out = self._transform(total) * tables.decode_scale
        if tables.center_sum is not None:
            out += tables.center_sum
        out[:, tables.bf16_index] = kept
        return out

    def _reference_reduce_encode(self, payloads: Tensor, tables: Tables) -> Tensor:
        total, kept = self._sum(payloads, tables)
        return self.for_sum()._write(total, wire.to_wire_bf16(kept))

    def _write(self, body: Tensor, kept: Tensor) -> Tensor:
        """Rows of a rotated body, fp32 ``[tokens, hidden]``, and BF16 features ``[tokens, k]``."""
        scale = rotation.token_scale(body, kept)
        inverse = torch.where(scale == 0, 0, 1 / scale.float())
        return wire.join_row(self._pack(body * inverse), torch.cat([kept, scale], dim=1))

    def _sum(self, payloads: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """fp32 sums in rank order: the rotated body ``[tokens, hidden]``, the BF16 features."""
        packed, floats = wire.split_row(payloads, self._body_bytes(tables.hidden))
        kept, scale = floats[..., :-1], floats[..., -1:]
        total = None
        for rank, codes in enumerate(packed):  # one rank at a time: no [ranks, tokens, hidden] fp32
            values = self._unpack(codes, tables.hidden)
            values *= scale[rank]
            total = values if total is None else total.add_(values)
        assert total is not None, "a group has ranks"
        return total, sum_in_rank_order(kept)

    def _body_bytes(self, hidden: int) -> int:
        return wire.packed_bytes(hidden, self.bits)

    def _pack(self, values: Tensor) -> Tensor:
        """The packed codes of a body divided by its scale, ``[tokens, hidden]``.

        A codec that changes this and `_unpack` must say in `kernels` that none knows it.
        """
        return wire.pack(codebook.quantize(values, self.bits), self.bits)

    def _unpack(self, packed: Tensor, hidden: int) -> Tensor:
        """fp32 ``[tokens, hidden]``: what the codes of `_pack` stand for, a new tensor."""
        return codebook.dequantize(wire.unpack(packed, self.bits, hidden), self.bits)

    def _transform(self, body: Tensor) -> Tensor:
        return rotation.hadamard(body) if self.rotate else body
