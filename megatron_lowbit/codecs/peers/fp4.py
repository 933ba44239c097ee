"""Formats of 4-bit floats: MXFP4 and NVFP4.

The values are E2M1 in both: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, codes 0 to 7 and, with
the sign, 8 to 15. They are rounded to nearest, ties to even, and saturate at 6. See
`codecs.peers.group_frame` for what they share with other peers.
"""

from functools import lru_cache

import torch
from torch import Tensor

from megatron_lowbit.codecs.peers.group_frame import Scaled, absmax, divide, extremes

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_MAX = 6.0
_E2M1_MAX_EXPONENT = 2
_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


class _Fp4(Scaled):
    """E2M1 values with one scale per group."""

    supported_bits = (4,)

    def _to_codes(self, steps: Tensor) -> Tensor:
        magnitude = steps.abs()
        # A tie goes to the even code: up at a midpoint after an odd one, where >= holds.
        codes = (magnitude > 0.25).to(torch.uint8)
        for number, (lower, upper) in enumerate(zip(_E2M1[1:-1], _E2M1[2:], strict=True), start=1):
            middle = (lower + upper) / 2
            codes += magnitude >= middle if number % 2 else magnitude > middle
        return codes.add_(steps < 0, alpha=8)

    def _from_codes(self, codes: Tensor) -> Tensor:
        return _levels(codes.device).index_select(0, codes.flatten()).view(codes.shape)


class Mxfp4(_Fp4):
    """MXFP4: groups of 32 with an E8M0 scale, a power of two: 4.25 bits.

    OCP Microscaling Formats (MX) Specification v1.0, section 6.3: the scale's exponent is that of
    the largest magnitude, rounded down, less 2, the exponent of the largest E2M1 value; so values
    above 6 steps, up to 8, saturate. Communication Compression for Tensor Parallel LLM Inference
    (arXiv:2411.09510) sends block-wise formats of this family by all-gather.
    """

    name = "mxfp4"
    format = "mxfp4"
    group = 32
    scale_dtype = torch.float8_e8m0fnu

    def _scale(self, low: Tensor, high: Tensor) -> Tensor:
        exponent = absmax(low, high).view(torch.int32) & 0x7F800000  # NaN: infinity
        return (exponent.view(torch.float32) / 2**_E2M1_MAX_EXPONENT).clamp(min=2.0**-127)


class Nvfp4(_Fp4):
    """NVFP4: groups of 16 with an E4M3 scale, and an fp32 scale: 4.5 + 32 / hidden bits.

    The second scale, absmax / (6 * 448), brings the first ones into the range of E4M3. NVIDIA has
    one for a tensor, which would make a token's result depend on its neighbours: here it is one
    per token, sent with it, of the token's groups that are all finite. So a NaN or an infinity can
    change how the token's other groups are rounded, if its own group had the largest value.

    No system is known that sums partials in this format.
    """

    name = "nvfp4"
    format = "nvfp4"
    group = 16
    scale_dtype = torch.float8_e4m3fn

    def _numbers(self, groups: int) -> tuple[tuple[torch.dtype, int], ...]:
        return ((torch.float32, 1), (self.scale_dtype, groups))

    def _quantize(self, values: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        low, high = extremes(values)
        largest = absmax(low, high).nan_to_num_(0).amax(dim=1, keepdim=True)
        of_token = divide(largest, _E2M1_MAX * _E4M3_MAX)
        codes, scales = super()._quantize(values / torch.where(of_token == 0, 1, of_token))
        return codes, (of_token.squeeze(-1), *scales)

    def _dequantize(self, codes: Tensor, numbers: tuple[Tensor, ...]) -> Tensor:
        of_token, *scales = numbers
        return super()._dequantize(codes, tuple(scales)).mul_(of_token)

    def _scale(self, low: Tensor, high: Tensor) -> Tensor:
        return divide(absmax(low, high), _E2M1_MAX)

    def _to_wire(self, scale: Tensor) -> Tensor:
        return scale.clamp(max=_E4M3_MAX).to(self.scale_dtype)


@lru_cache
def _levels(device: torch.device) -> Tensor:
    """fp32 ``[16]``: the value of each code."""
    return torch.tensor([*_E2M1, *(-level for level in _E2M1)], device=device)
