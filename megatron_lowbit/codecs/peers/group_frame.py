"""The frame of the peers' formats: small codes, and a few numbers per group of features.

The peers are here for honest comparison; `codecs.peers.systems` lists them. Nothing is calibrated,
so the tables hold nothing. Only `sdp4bit` rotates, and only `spike-g32` keeps values apart:
elsewhere a large feature takes its group's precision. The last group of a token is shorter where
the group size does not divide the hidden size. A row is laid out as

    packed codes | zero bytes up to a multiple of the first number's size | numbers, kind by kind

A group with a NaN or an infinity has a NaN for its scale: that group of that token comes out as
NaN, the token's other groups and all other tokens do not change. A group of zeros gives zeros, as
does one whose scale is too small for its type. Finite magnitudes above the largest BF16 value,
which only fp32 input can have, are taken for that value.

Formats, group sizes and types of the numbers follow the peers' sources. What they do not follow is
where a peer departs from the contract of `codecs.base`: sums in 16 bits, an own chunk that skips
the wire, codes for a NaN that a number can have.

The plain torch here is the specification; on GPUs `kernels.triton.grouped` gives the same bits.
"""

import abc
import itertools
from types import ModuleType

import torch
from torch import Tensor

from megatron_lowbit.codecs import wire
from megatron_lowbit.codecs.base import Codec, rounded_into
from megatron_lowbit.codecs.tables import Tables
from megatron_lowbit.kernels import select

_BF16_MAX = torch.finfo(torch.bfloat16).max


class Grouped(Codec):
    """Codes of `bits` bits, and numbers that say what the codes of a group mean.

    Attributes:
        group: Features that share numbers; None for all features of a token.
        format: What the kernels know it by (`kernels.triton.grouped`); None if they do not. Who
            overrides a hook says anew.
    """

    group: int | None
    format: str | None = None
    takes_index = False

    @abc.abstractmethod
    def _numbers(self, groups: int) -> tuple[tuple[torch.dtype, int], ...]:
        """Type and count in a row of each kind of number, the largest type first."""

    @abc.abstractmethod
    def _quantize(self, values: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Codes and numbers of fp32 ``[tokens, groups, size]``.

        Returns:
            Integers in ``[0, 2**bits)``, shaped like `values`, and for each kind of number a
            contiguous ``[tokens, count]`` in its type.
        """

    @abc.abstractmethod
    def _dequantize(self, codes: Tensor, numbers: tuple[Tensor, ...]) -> Tensor:
        """New fp32 ``[tokens, hidden]`` of int32 codes ``[tokens, hidden]`` and the numbers."""

    def row_bytes(self, tables: Tables) -> int:
        return self._offsets(tables.hidden)[-1]

    def encode(self, partial: Tensor, tables: Tables, *, rank: int = 0) -> Tensor:
        module = self.kernels(partial, tables)
        if module is None:
            return self._reference_encode(partial)
        return module.encode(partial, **self._layout(tables.hidden))

    def decode_sum(self, payloads: Tensor, tables: Tables, *, out: Tensor | None = None) -> Tensor:
        module = self.kernels(payloads, tables)
        if module is None:
            return rounded_into(out, self._reference_decode_sum(payloads, tables.hidden))
        return module.decode_sum(payloads, out=out, **self._layout(tables.hidden))

    def kernels(self, values: Tensor, tables: Tables) -> ModuleType | None:
        return select.kernels_for(select.GROUPED, values) if self.format else None

    def _layout(self, hidden: int) -> dict:
        """What kernels must know of the rows of a payload."""
        body_bytes, *_, row_bytes = self._offsets(hidden)
        return {
            "hidden": hidden,
            "format": self.format,
            "group": self.group,
            "bits": self.bits,
            "body_bytes": body_bytes,
            "row_bytes": row_bytes,
        }

    def _reference_encode(self, partial: Tensor) -> Tensor:
        tokens, hidden = partial.shape
        groups, size = self._groups(hidden)
        values = partial.float()
        if groups * size > hidden:
            # The last group is filled up with its last value: that changes neither its extremes nor
            # where they first are.
            filling = values[:, -1:].expand(tokens, groups * size - hidden)
            values = torch.cat([values, filling], dim=1)
        codes, numbers = self._quantize(values.reshape(tokens, groups, size))
        packed = wire.pack(codes.flatten(1)[:, :hidden], self.bits)
        packed = torch.nn.functional.pad(packed, (0, self._offsets(hidden)[0] - packed.shape[1]))
        return torch.cat([packed, *map(wire.bytes_of, numbers)], dim=1)

    def _reference_decode_sum(self, payloads: Tensor, hidden: int) -> Tensor:
        kinds = self._numbers(self._groups(hidden)[0])
        spans = list(zip(kinds, itertools.pairwise(self._offsets(hidden)), strict=True))
        total = None
        for rows in payloads:  # a rank at a time: no [ranks, tokens, hidden] fp32
            packed = rows[:, : wire.packed_bytes(hidden, self.bits)]
            numbers = tuple(
                _from_bytes(rows[:, start:stop], dtype, count)
                for (dtype, count), (start, stop) in spans
            )
            values = self._dequantize(wire.unpack(packed, self.bits, hidden), numbers)
            total = values if total is None else total.add_(values)
        assert total is not None, "a group has ranks"
        return total

    def _groups(self, hidden: int) -> tuple[int, int]:
        """Groups in a token, and features in each but the last."""
        size = self.group or max(hidden, 1)
        return -(-hidden // size), size

    def _offsets(self, hidden: int) -> list[int]:
        """Where in a row each kind of number begins, and where the row ends.

        The first is aligned, for a kernel that loads them in one piece.
        """
        kinds = self._numbers(self._groups(hidden)[0])
        unit = kinds[0][0].itemsize
        first = -(-wire.packed_bytes(hidden, self.bits) // unit) * unit
        sizes = (dtype.itemsize * count for dtype, count in kinds)
        return list(itertools.accumulate(sizes, initial=first))

    def _per_feature(self, numbers: Tensor, hidden: int) -> Tensor:
        """``[tokens, hidden]`` of ``[tokens, groups]``."""
        return numbers.repeat_interleave(self._groups(hidden)[1], dim=1)[:, :hidden]


class Scaled(Grouped):
    """One scale per group; this one: signed integers with 2**(bits-1) - 1 at the group's absmax.

    Encode: divide by the step as the receivers will know it, round to the nearest value of the
    format, ties to even, saturate. Another such format overrides the hooks that differ.

    Attributes:
        scale_dtype: Type of a scale on the wire.
    """

    scale_dtype: torch.dtype

    def _numbers(self, groups: int) -> tuple[tuple[torch.dtype, int], ...]:
        return ((self.scale_dtype, groups),)

    def _quantize(self, values: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        scale = self._scale(*extremes(values))
        scale = self._to_wire(torch.where(scale.isfinite(), scale, torch.nan))
        step = self._step(scale)
        usable = step.isfinite() & (step != 0)
        codes = self._to_codes(torch.where(usable, values / step, 0))
        return codes, (scale.squeeze(-1),)

    def _dequantize(self, codes: Tensor, numbers: tuple[Tensor, ...]) -> Tensor:
        values = self._from_codes(codes)
        return values.mul_(self._per_feature(self._step(numbers[0]), values.shape[1]))

    def _scale(self, low: Tensor, high: Tensor) -> Tensor:
        """fp32 ``[tokens, groups, 1]``: the number to send, of `extremes`.

        Where they are NaN it may be anything that is not finite.
        """
        return divide(absmax(low, high), 2 ** (self.bits - 1) - 1)

    def _to_wire(self, scale: Tensor) -> Tensor:
        """An fp32 scale, finite or NaN, in the type of the wire."""
        return scale.to(self.scale_dtype)

    def _step(self, scale: Tensor) -> Tensor:
        """fp32, of a scale from the wire: what 1 in `_to_codes` and `_from_codes` stands for."""
        return scale.float()

    def _to_codes(self, steps: Tensor) -> Tensor:
        """Codes of finite fp32 values in units of the step."""
        half = 2 ** (self.bits - 1)
        return steps.round().clamp(-half, half - 1).to(torch.int32) + half

    def _from_codes(self, codes: Tensor) -> Tensor:
        """New fp32 values, in units of the step, of int32 codes."""
        return (codes - 2 ** (self.bits - 1)).float()


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest value of each group of ``[tokens, groups, size]``, with size 1.

    Finite ones are within the BF16 range, above which a scale that is rounded up could make an
    infinity of a finite value; both are NaN where the group is not all finite. A zero is positive:
    which of a group's zeros would come out is up to the order of comparisons.
    """
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    finite = low.isfinite() & high.isfinite()
    low, high = low.clamp(min=-_BF16_MAX, max=_BF16_MAX), high.clamp(min=-_BF16_MAX, max=_BF16_MAX)
    return torch.where(finite, low + 0.0, torch.nan), torch.where(finite, high + 0.0, torch.nan)


def absmax(low: Tensor, high: Tensor) -> Tensor:
    """The largest magnitude, of `extremes`; a zero is positive."""
    return torch.maximum(high.abs(), low.abs())


def divide(values: Tensor, by: float) -> Tensor:
    """``values / by``, correctly rounded on GPUs, too: by a number torch multiplies with 1 / by."""
    return values / values.new_full((), by)


def _from_bytes(rows: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """``[tokens, count]`` of the bytes that `wire.bytes_of` makes, at any place in memory."""
    # A copy, since torch views only aligned bytes as another type.
    return rows.flatten().clone().view(dtype).view(len(rows), count)
