"""Flash Communication: integers between a group's least and largest value, spikes apart or not.

Flash Communication (arXiv:2412.04964, algorithm 1) quantizes each partial, and then the sum, to
integers with a scale and a zero per group; FlashCommunication V2 (arXiv:2508.03760) keeps a group's
minimum and maximum apart as floating-point numbers, so that the others, in a smaller range, can do
with 2 bits. V2's bit splitting is a layout of codes that changes no value.

No public code was found. Not verified against the papers' full texts: the group sizes (32, and 128
for comparison), BF16 for scale, zero and spikes, and a byte for a spike's position.
"""

import torch
from torch import Tensor

from megatron_lowbit.codecs import wire
from megatron_lowbit.codecs.peers.group_frame import Grouped, divide, extremes

_LARGEST = torch.finfo(torch.bfloat16).max / 2  # of either sign: their difference is still finite


class Int4Group32Asymmetric(Grouped):
    """Flash Communication: int4 (8, 6, 5, 3, 2) in groups of 32, scale and zero in BF16: 5 bits.

    Code 0 is the zero, the group's least value; the scale is (max - min) / (2**bits - 1). Finite
    magnitudes above half the largest BF16 value are taken for that.
    """

    name = "int4-g32-asym"
    format = "affine"
    supported_bits: tuple[int, ...] = (4, 8, 6, 5, 3, 2)
    group = 32

    def _numbers(self, groups: int) -> tuple[tuple[torch.dtype, int], ...]:
        return ((torch.bfloat16, groups), (torch.bfloat16, groups))

    def _quantize(self, values: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._between(values, *extremes(values))

    def _dequantize(self, codes: Tensor, numbers: tuple[Tensor, ...]) -> Tensor:
        scale, zero = (self._per_feature(n.float(), codes.shape[1]) for n in numbers)
        return codes.float().mul_(scale).add_(zero)

    def _between(
        self, values: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`_quantize` with levels from `low` to `high`, fp32 ``[tokens, groups, 1]``."""
        top = 2**self.bits - 1
        low, high = low.clamp(-_LARGEST, _LARGEST), high.clamp(-_LARGEST, _LARGEST)
        scale, zero = divide(high - low, top).bfloat16(), low.bfloat16()
        step = scale.float()  # as the receivers will see it, and so the zero
        usable = step.isfinite() & (step != 0)
        steps = torch.where(usable, (values - zero.float()) / step, 0)
        codes = steps.round_().clamp_(0, top).to(torch.int32)
        return codes, (scale.squeeze(-1), zero.squeeze(-1))


class Int4Group128Asymmetric(Int4Group32Asymmetric):
    """Flash Communication in groups of 128: 4.25 bits."""

    name = "int4-g128-asym"
    group = 128


class SpikeGroup32(Int4Group32Asymmetric):
    """FlashCommunication V2, spike reserving: int2 (3, 4) in groups of 32: 4.5 bits.

    A group's largest and least value are sent in BF16 with a byte each for their places, the first
    ones where there are several; scale and zero are those of the others. A zero is positive.
    """

    name = "spike-g32"
    format = "spikes"
    supported_bits = (2, 3, 4)

    def _numbers(self, groups: int) -> tuple[tuple[torch.dtype, int], ...]:
        spikes = ((torch.bfloat16, 2 * groups), (torch.uint8, 2 * groups))
        return (*super()._numbers(groups), *spikes)

    def _quantize(self, values: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        high, high_at = values.max(dim=-1, keepdim=True)
        low, low_at = values.min(dim=-1, keepdim=True)
        spikes, places = torch.cat([high, low], dim=-1), torch.cat([high_at, low_at], dim=-1)
        rest = values.scatter(-1, places, values.gather(-1, _not_among(places)).expand_as(places))
        finite = spikes.isfinite().all(dim=-1, keepdim=True)
        bounds = (torch.where(finite, bound, torch.nan) for bound in extremes(rest))
        codes, numbers = self._between(rest, *bounds)
        spikes = wire.to_wire_bf16(torch.where(finite, spikes + 0.0, torch.nan))
        return codes, (*numbers, spikes.flatten(1), places.to(torch.uint8).flatten(1))

    def _dequantize(self, codes: Tensor, numbers: tuple[Tensor, ...]) -> Tensor:
        *affine, spikes, places = numbers
        values = super()._dequantize(codes, tuple(affine))
        groups = torch.arange(spikes.shape[1] // 2, device=codes.device).repeat_interleave(2)
        return values.scatter_(1, places + groups * self.group, spikes.float())


def _not_among(places: Tensor) -> Tensor:
    """``[tokens, groups, 1]``: the first place that is none of the two in ``[..., 2]``."""
    taken = [(places == place).any(dim=-1, keepdim=True) for place in (0, 1)]
    return torch.where(taken[0], torch.where(taken[1], 2, 1), 0)
