"""What the peers send, for honest comparison: small values, one scale per group of features.

Encode, for each group of consecutive features of a token: divide by the group's scale, its largest
magnitude over the largest value of the format; round to the nearest value, ties to even; saturate.
The last group is shorter where the group size does not divide the hidden size. Nothing is
calibrated, rotated or kept apart, so the tables hold nothing, and a large feature takes its group's
precision. A row is laid out as

    packed codes | zero bytes up to a multiple of a scale's size | one scale per group

A group with a NaN or an infinity has a NaN for a scale: that group of that token comes out as NaN,
the token's other groups and all other tokens do not change. A group of zeros has scale zero and
gives zeros, as does one whose scale is too small for its type. Finite magnitudes above the largest
BF16 value, which only fp32 input can have, are taken for that value.

The configurations follow the peers' sources (QuickReduce as in vLLM, `csrc/quickreduce`; FlashInfer
`comm/quantized_allreduce.py`; SGLang `npu_communicator.py`) in format, group size and type of the
scale. What they do not follow is where the peers depart from the contract of `codecs.base`: sums in
16 bits (QuickReduce, SGLang), an own chunk that skips the wire (FlashInfer). QuickReduce's two
groups in 64 features are the even and the odd ones; here they are the first 32 and the last.

Another format with one number per group is one more subclass of `Grouped`: its group and scale
type, and of the three hooks `_scale`, `_to_codes` and `_from_codes` those that differ.
"""

import torch
from torch import Tensor

from megatron_lowbit.codecs import wire
from megatron_lowbit.codecs.base import Codec, Tables, rounded_into

_BF16_MAX = torch.finfo(torch.bfloat16).max
_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


class Grouped(Codec):
    """Signed integers of `bits` bits, 2**(bits-1) - 1 at the group's absmax, and a scale per group.

    Attributes:
        group: Features that share a scale; None for all features of a token.
        scale_dtype: Type of a scale on the wire.
    """

    group: int | None
    scale_dtype: torch.dtype
    takes_index = False

    def row_bytes(self, tables: Tables) -> int:
        groups, _ = self._groups(tables.hidden)
        return self._scales_offset(tables.hidden) + groups * self.scale_dtype.itemsize

    def encode(self, partial: Tensor, tables: Tables, *, rank: int = 0) -> Tensor:
        tokens, hidden = partial.shape
        groups, size = self._groups(hidden)
        values = torch.nn.functional.pad(partial.float(), (0, groups * size - hidden))
        values = values.view(tokens, groups, size)
        scale = self._wire_scale(values)
        # Divided by the scale that the receivers will see, not by what it was before rounding.
        received = scale.float()
        usable = received.isfinite() & (received != 0)
        steps = torch.where(usable, values / received, 0)
        codes = self._to_codes(steps).flatten(1)[:, :hidden]
        return self._join(wire.pack(codes, self.bits), scale.squeeze(-1), hidden)

    def decode_sum(self, payloads: Tensor, tables: Tables, *, out: Tensor | None = None) -> Tensor:
        hidden = tables.hidden
        _, size = self._groups(hidden)
        packed = payloads[..., : wire.packed_bytes(hidden, self.bits)]
        scales = payloads[..., self._scales_offset(hidden) :].contiguous().view(self.scale_dtype)
        total = None
        for rank, codes in enumerate(packed):  # one rank at a time: no [ranks, tokens, hidden] fp32
            values = self._from_codes(wire.unpack(codes, self.bits, hidden))
            values *= scales[rank].float().repeat_interleave(size, dim=1)[:, :hidden]
            total = values if total is None else total.add_(values)
        return rounded_into(out, total)

    def _scale(self, values: Tensor) -> Tensor:
        """fp32 ``[tokens, groups, 1]``: the value of one step, of fp32 ``[tokens, groups, size]``.

        `values` are within the BF16 range or not finite; a scale that should be NaN may be anything
        that is not finite.
        """
        return values.abs().amax(dim=-1, keepdim=True) / (2 ** (self.bits - 1) - 1)

    def _to_codes(self, steps: Tensor) -> Tensor:
        """Codes, integers in ``[0, 2**bits)``, of finite fp32 values in units of the scale."""
        half = 2 ** (self.bits - 1)
        return steps.round().clamp(-half, half - 1).to(torch.int32) + half

    def _from_codes(self, codes: Tensor) -> Tensor:
        """fp32 values, in units of the scale, of int32 codes."""
        return (codes - 2 ** (self.bits - 1)).float()

    def _wire_scale(self, values: Tensor) -> Tensor:
        """``[tokens, groups, 1]`` in the type of the wire; NaN for a group not all finite."""
        # Above this a scale that is rounded up could make an infinity of a finite value.
        finite = values.clamp(-_BF16_MAX, _BF16_MAX)
        scale = self._scale(torch.where(values.isinf(), torch.nan, finite))
        return torch.where(scale.isfinite(), scale, torch.nan).to(self.scale_dtype)

    def _groups(self, hidden: int) -> tuple[int, int]:
        """Groups in a token, and features in each but the last."""
        size = self.group or max(hidden, 1)
        return -(-hidden // size), size

    def _scales_offset(self, hidden: int) -> int:
        """Where in a row the scales begin: aligned, for a kernel that loads them in one piece."""
        body, unit = wire.packed_bytes(hidden, self.bits), self.scale_dtype.itemsize
        return -(-body // unit) * unit

    def _join(self, packed: Tensor, scale: Tensor, hidden: int) -> Tensor:
        """Rows of ``uint8 [tokens, bytes]`` and of scales ``[tokens, groups]``."""
        tokens, groups = scale.shape
        packed = torch.nn.functional.pad(packed, (0, self._scales_offset(hidden) - packed.shape[1]))
        # By way of one dimension: torch will not view an empty [0, 1] as another type.
        scale_bytes = scale.flatten().view(torch.uint8)
        return torch.cat([packed, scale_bytes.view(tokens, groups * scale.itemsize)], dim=1)


class Int4Group32(Grouped):
    """QuickReduce: int4 (8, 6, 3) in groups of 32 with a BF16 scale: 4.5 bits.

    The feature with the largest magnitude becomes -8, by a scale that has a sign, so that all 16
    levels are in use; one of the opposite sign and beyond 7.5 steps saturates at 7.
    """

    name = "int4-g32"
    supported_bits = (4, 8, 6, 3)
    group = 32
    scale_dtype = torch.bfloat16

    def _scale(self, values: Tensor) -> Tensor:
        high = values.amax(dim=-1, keepdim=True)
        low = values.amin(dim=-1, keepdim=True)
        return torch.where(high > -low, high, low) / -(2 ** (self.bits - 1))


class Int8Token(Grouped):
    """SGLang: int8 with an fp32 scale per token, absmax / 127: 8.01 bits at hidden 4096."""

    name = "int8-token"
    supported_bits = (8,)
    group = None
    scale_dtype = torch.float32


class Fp8Group256(Grouped):
    """FlashInfer: FP8 E4M3 in groups of 256 with an fp32 scale, absmax / 448: 8.125 bits."""

    name = "fp8-g256"
    supported_bits = (8,)
    group = 256
    scale_dtype = torch.float32

    def _scale(self, values: Tensor) -> Tensor:
        return values.abs().amax(dim=-1, keepdim=True) / _FP8_MAX

    def _to_codes(self, steps: Tensor) -> Tensor:
        # torch's cast rounds to even, but makes NaN of what is above the largest value.
        steps = steps.clamp(-_FP8_MAX, _FP8_MAX)
        return steps.to(torch.float8_e4m3fn).view(torch.uint8)

    def _from_codes(self, codes: Tensor) -> Tensor:
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
