"""Peers with one scale per group and values around zero: QuickReduce, aiter, SGLang, FlashInfer.

And ggml's blocks, which distributed-llama sums. By their sources: QuickReduce as in vLLM,
`csrc/quickreduce`; aiter's FlyDSL all-reduce, `aiter/ops/flydsl/kernels/quick_allreduce_codec.py`
(ROCm/aiter pull requests 4970 and 5555); SGLang `npu_communicator.py`; FlashInfer
`comm/quantized_allreduce.py`; b4rtaz/distributed-llama `src/nn`; ikawrakow/ik_llama.cpp
`ggml/src/ggml-cuda`. See `codecs.peers.group_frame` for what they share. QuickReduce's two groups
in 64 features are the even and the odd ones; here they are the first 32 and the last.
"""

import torch
from torch import Tensor

from megatron_lowbit.codecs.peers.group_frame import Scaled, absmax, divide

FP16_MAX = torch.finfo(torch.float16).max
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_AITER_NAN, _AITER_MAX = 0x7F, 0x7E  # without the sign


class Int4Group32(Scaled):
    """QuickReduce: int4 (8, 6, 3) in groups of 32 with a BF16 scale: 4.5 bits.

    The feature with the largest magnitude becomes -8, by a scale that has a sign, so that all 16
    levels are in use; one of the opposite sign and beyond 7.5 steps saturates at 7.
    """

    name = "int4-g32"
    format = "signed"
    supported_bits = (4, 8, 6, 3)
    group = 32
    scale_dtype = torch.bfloat16

    def _scale(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.where(high > -low, high, low) / -(2 ** (self.bits - 1))


class Int4Group16(Scaled):
    """aiter: int4 (6, 5) in groups of 16; the value of largest magnitude, in E4M3: 4.5 bits.

    That value becomes -8, as in QuickReduce. aiter's E4M3 has no subnormal numbers: its codes are
    those of OCP's, but exponent 0 goes on as 2**-7 (1 + m/8). Halves are rounded up, and what is
    less than 2**-7 keeps its mantissa at that exponent. So a group whose magnitudes are all below
    2**-11 gives zeros, and there are no larger ones than 448: no second scale brings a token into
    that range. (aiter goes up to 480, by the codes that are NaN here.)
    """

    name = "int4-g16"
    format = "signed-e4m3"
    supported_bits = (4, 6, 5)
    group = 16
    scale_dtype = torch.uint8

    def _scale(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.where(high > -low, high, low)

    def _to_wire(self, scale: Tensor) -> Tensor:
        # The upper bits of an fp32, rounded, with the exponent's bias of 127 made one of 7.
        code = ((scale.abs().view(torch.int32) + (1 << 19)) >> 20) - ((127 - 7) << 3)
        code = torch.where(code < 0, code & 7, code).clamp(max=_AITER_MAX)
        # Code 0 is for zero alone; 2**-7 is taken for the next one.
        code = torch.where((code == 0) & (scale > 0), 1, code)
        code = torch.where(scale.isnan(), _AITER_NAN, code)
        return (code | (scale < 0).int() << 7).to(torch.uint8)

    def _step(self, scale: Tensor) -> Tensor:
        code = scale.int()
        magnitude = (((code & 0x7F) + ((127 - 7) << 3)) << 20).view(torch.float32)
        value = torch.where(code < 0x80, magnitude, -magnitude)
        value = torch.where(code & 0x7F == _AITER_NAN, torch.nan, value)
        return torch.where(code == 0, 0, value) / -(2 ** (self.bits - 1))


class Int8Token(Scaled):
    """SGLang: int8 with an fp32 scale per token, absmax / 127: 8.01 bits at hidden 4096."""

    name = "int8-token"
    format = "absmax"
    supported_bits = (8,)
    group = None
    scale_dtype = torch.float32


class Int8Group32(Scaled):
    """ggml's q8_0: int8 in groups of 32 with an fp16 scale, absmax / 127: 8.5 bits.

    distributed-llama calls it q80 (`nn-quants.cpp`): every node sends its partial to every other,
    and each sums all of them in fp32 (`llm.cpp`, `nn-network.cpp`): one-shot. ik_llama.cpp
    (`reduce.cu`, `--graph-reduce-type q8_0`, above 32 tokens; its default is fp16) sums in a ring
    and quantizes after every addition. None of our collectives does; of 2 ranks it is two-shot.

    Not followed: they divide by the scale before it is rounded to fp16, here by the one that is
    sent. They round halves away from zero; here, as in distributed-llama's AVX2 code, to even.
    Their scale overflows above 127 * 65504; here values saturate at 127 and -128 times 65504.
    """

    name = "int8-g32"
    format = "absmax-fp16"
    supported_bits = (8,)
    group = 32
    scale_dtype = torch.float16

    def _to_wire(self, scale: Tensor) -> Tensor:
        return scale.clamp(max=FP16_MAX).to(self.scale_dtype)


class Fp8Group256(Scaled):
    """FlashInfer: FP8 E4M3 in groups of 256 with an fp32 scale, absmax / 448: 8.125 bits."""

    name = "fp8-g256"
    format = "fp8"
    supported_bits = (8,)
    group = 256
    scale_dtype = torch.float32

    def _scale(self, low: Tensor, high: Tensor) -> Tensor:
        return divide(absmax(low, high), FP8_MAX)

    def _to_codes(self, steps: Tensor) -> Tensor:
        # torch's cast rounds to even, but makes NaN of what is above the largest value.
        steps = steps.clamp(-FP8_MAX, FP8_MAX)
        return steps.to(torch.float8_e4m3fn).view(torch.uint8)

    def _from_codes(self, codes: Tensor) -> Tensor:
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
