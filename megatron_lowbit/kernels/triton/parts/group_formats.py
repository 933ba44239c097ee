"""The peers' formats in Triton: what a group's numbers and codes are, by the name of the format.

| FORMAT | codec | scale on the wire | codes |
| --- | --- | --- | --- |
| signed | int4-g32 | BF16, of the largest magnitude with its sign | integers around 0 |
| signed-e4m3 | int4-g16 | aiter's E4M3, the same | integers around 0 |
| absmax | int8-token, sdp4bit-plain | fp32, absmax / (2**(BITS - 1) - 1) | integers around 0 |
| absmax-fp16 | int8-g32 | fp16, the same | integers around 0 |
| absmax-rotated | sdp4bit | as absmax, of rotated values | integers around 0 |
| fp8 | fp8-g256 | fp32, absmax / 448 | E4M3 |
| mxfp4 | mxfp4 | E8M0, the exponent of absmax | E2M1 |
| nvfp4 | nvfp4 | E4M3, of what is divided by the token's fp32 scale | E2M1 |
| affine | int4-g32-asym and its kin | BF16, and a BF16 zero | integers from 0 |
| spikes | spike-g32 | as affine, and two BF16 values with their places | integers from 0 |

The bits are those of `symmetric_groups`, `asymmetric_groups`, `fp4` and `sdp4bit` in
`codecs.peers`, which say whose formats they are and why. Small floats are made and read by
integer operations: not every GPU has instructions for them, and the interpreter rounds otherwise. A
tile is ``[groups, features]``.
"""

import triton
import triton.language as tl

from megatron_lowbit.kernels.triton.parts import values as parts

# Bytes of a group's scale on the wire.
SCALE_BYTES = {"signed": 2, "signed-e4m3": 1, "fp8": 4, "mxfp4": 1, "nvfp4": 1}
SCALE_BYTES |= {"absmax": 4, "absmax-fp16": 2, "absmax-rotated": 4}
SCALE_BYTES |= {"affine": 2, "spikes": 2, "bf16": 0}


@triton.jit
def extremes(values, FORMAT: tl.constexpr):
    """fp32 [groups]: least and largest value of each group; NaN where not all are finite."""
    bf16: tl.constexpr = 3.3895313892515355e38  # the largest
    largest: tl.constexpr = bf16 / 2 if FORMAT == "affine" or FORMAT == "spikes" else bf16
    finite = tl.min((tl.abs(values) < float("inf")).to(tl.int32), axis=1) != 0
    low = tl.maximum(tl.minimum(tl.min(values, axis=1), largest), -largest)
    high = tl.maximum(tl.minimum(tl.max(values, axis=1), largest), -largest)
    low, high = tl.where(low == 0, 0.0, low), tl.where(high == 0, 0.0, high)  # no negative zero
    return tl.where(finite, low, float("nan")), tl.where(finite, high, float("nan"))


@triton.jit
def absmax(low, high):
    """The largest magnitude, of `extremes`."""
    return tl.maximum(tl.abs(low), tl.abs(high))


@triton.jit
def encode_scale(low, high, FORMAT: tl.constexpr, BITS: tl.constexpr):
    """int32 [groups]: the bits of each group's scale on the wire, of its `extremes`."""
    signed = tl.where(high > -low, high, low)
    size = absmax(low, high)
    if FORMAT == "signed":
        bits = parts.bf16_bits(signed * (-1.0 / (1 << (BITS - 1))))
    elif FORMAT == "signed-e4m3":
        bits = _aiter_bits(signed)
    elif FORMAT == "absmax" or FORMAT == "absmax-rotated":
        bits = tl.div_rn(size, (1 << (BITS - 1)) - 1.0).to(tl.int32, bitcast=True)
    elif FORMAT == "absmax-fp16":
        half = tl.minimum(tl.div_rn(size, (1 << (BITS - 1)) - 1.0), 65504.0).to(tl.float16)
        bits = half.to(tl.int16, bitcast=True).to(tl.int32)
        bits = tl.where(size == size, bits, 0x7E00)
    elif FORMAT == "fp8":
        bits = tl.div_rn(size, 448.0).to(tl.int32, bitcast=True)
    elif FORMAT == "mxfp4":
        exponent = size.to(tl.int32, bitcast=True) >> 23
        bits = tl.where(size == size, tl.maximum(exponent - 2, 0), 255)
    elif FORMAT == "nvfp4":
        bits = _e4m3_bits(tl.div_rn(size, 6.0))
        bits = tl.where(size == size, bits, 0x7F)
    else:
        bits = parts.bf16_bits(tl.div_rn(high - low, (1 << BITS) - 1.0))
    return bits


@triton.jit
def decode_scale(bits, FORMAT: tl.constexpr, BITS: tl.constexpr):
    """fp32: the step that the bits of a scale stand for."""
    if FORMAT == "signed-e4m3":
        step = _aiter_value(bits) * (-1.0 / (1 << (BITS - 1)))
    elif FORMAT == "absmax" or FORMAT == "absmax-rotated" or FORMAT == "fp8":
        step = bits.to(tl.float32, bitcast=True)
    elif FORMAT == "absmax-fp16":
        step = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == "mxfp4":
        # Code 0 is the subnormal 2**-127.
        step = tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)
        step = tl.where(bits == 255, float("nan"), step)
    elif FORMAT == "nvfp4":
        step = _e4m3_value(bits)
    else:
        step = (bits << 16).to(tl.float32, bitcast=True)
    return step


@triton.jit
def to_codes(steps, FORMAT: tl.constexpr, BITS: tl.constexpr):
    """int32 codes of fp32 values in units of the step; of NaN anything."""
    half: tl.constexpr = 1 << (BITS - 1)
    if FORMAT == "fp8":
        codes = _e4m3_bits(steps)
    elif FORMAT == "mxfp4" or FORMAT == "nvfp4":
        codes = _e2m1_bits(steps)
    elif FORMAT == "affine" or FORMAT == "spikes":
        codes = parts.round_within(steps, 0, 2 * half - 1)
    else:
        codes = parts.round_within(steps, -half, half - 1) + half
    return codes


@triton.jit
def from_codes(codes, FORMAT: tl.constexpr, BITS: tl.constexpr):
    """fp32 values, in units of the step, of int32 codes."""
    if FORMAT == "fp8":
        values = _e4m3_value(codes)
    elif FORMAT == "mxfp4" or FORMAT == "nvfp4":
        values = _e2m1_value(codes)
    elif FORMAT == "affine" or FORMAT == "spikes":
        values = codes.to(tl.float32)
    else:
        values = (codes - (1 << (BITS - 1))).to(tl.float32)
    return values


@triton.jit
def _aiter_bits(values):
    """int32 in [0, 256): aiter's E4M3, without subnormals: `codecs.peers.symmetric_groups`."""
    bits = tl.abs(values).to(tl.int32, bitcast=True)
    code = ((bits + (1 << 19)) >> 20) - (120 << 3)
    code = tl.minimum(tl.where(code < 0, code & 7, code), 0x7E)
    code = tl.where((code == 0) & (values > 0), 1, code)
    code = tl.where(values == values, code, 0x7F)
    return code | tl.where(values < 0, 0x80, 0)


@triton.jit
def _aiter_value(codes):
    """fp32 of what `_aiter_bits` gives."""
    size = ((codes & 0x7F) + (120 << 3)) << 20
    value = (size | ((codes & 0x80) << 24)).to(tl.float32, bitcast=True)
    value = tl.where((codes & 0x7F) == 0x7F, float("nan"), value)
    return tl.where(codes == 0, 0.0, value)


@triton.jit
def _e4m3_bits(values):
    """int32 in [0, 256): fp32 to the nearest E4M3, ties to even, saturated; of NaN anything."""
    size = tl.minimum(tl.abs(values), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # fp32 has no smaller parts than 2**-9, the step of the subnormal numbers, from 2**14 on.
    small = (size + 16384.0).to(tl.int32, bitcast=True) & 15
    sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(size < 2.0**-6, small, normal) | sign


@triton.jit
def _e4m3_value(codes):
    """fp32 of the bits of an E4M3."""
    size = codes & 0x7F
    normal = ((size + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 2.0**-9, normal)
    value = tl.where(size == 0x7F, float("nan"), value)
    # The sign by its bit: a negative zero is one.
    bits = value.to(tl.int32, bitcast=True) | ((codes & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _e2m1_bits(values):
    """int32 in [0, 16): fp32 to the nearest E2M1, ties to the even code, saturated."""
    size = tl.abs(values)
    codes = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32)
    codes += (size > 1.25).to(tl.int32) + (size >= 1.75).to(tl.int32)
    codes += (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    codes += (size > 5.0).to(tl.int32)
    return codes + tl.where(values < 0, 8, 0)


@triton.jit
def _e2m1_value(codes):
    """fp32 of the bits of an E2M1."""
    size = codes & 7
    normal = (size + (126 << 1)) << 22
    half = tl.where(size == 0, 0, 126 << 23)  # 0 and 0.5
    bits = tl.where(size < 2, half, normal) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True)
