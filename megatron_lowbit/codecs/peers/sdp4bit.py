"""SDP4Bit, which COCCL sends tensor-parallel sums in: int4 in groups of 128, rotated or not.

SDP4Bit (arXiv:2410.15526) compresses weights and gradients in training. COCCL, a fork of NCCL, has
it as a compressor for all collectives. Read were hpdps-group/SDP4Bit
(`megatron/quantization_helper.py`, `tools/jet_quant_cuda`), maomaohpp/coccl-dev
(`src/device/compress/sdp4bit`) and hpdps-group/COCCL (`sdp4bit_quan.cu` and the kernels of the
transform there; `src/coccl-extend/configs`):

- Codes of 4 or 8 bits around zero; the group size is a setting: 128 for gradients, 2048 for
  differences of weights. An fp32 scale, absmax / 7: with all 16 levels training converged worse.
- The transform is the Hadamard matrix of 32 in Sylvester's order, without signs, in front of the
  groups' scales. Payloads are summed as they are, in fp32; then the sum is turned back.
- SDP4Bit transforms gradients. COCCL's settings for tensor-parallel all-reduces and reduce-scatters
  (`training.toml`: 4 bits, groups of 128) do not: that is `sdp4bit-plain`.
- coccl-dev's `ncclAllReduceCompOptim` is two-shot from 1 to 32 MB, a ring above, and compresses
  nothing below; the later COCCL chooses by measuring.

Not followed:

- They round at random, seeded by the clock. Here it is to nearest, ties to even, or ranks and runs
  would differ.
- Their groups go through the whole message; here a row stands for itself.
- For 16-bit input COCCL transforms in that type, and leaves room for a second, unused fp32 a group
  (4.5 bits). Here it is fp32, and 4.25 bits.
- SDP4Bit sends 8 bits inside a node, and 4 bits of the node's sum, still transformed, between
  nodes. Here `bits` says it, and two-shot turns a sum back before it transforms it again: the same
  but for roundings.

Not verified: the paper's text beyond its abstract; the rounding in the latest COCCL, whose file was
not to be had; how it all-reduces with the transform on, which its fused step of the sum refuses.
"""

import torch
from torch import Tensor

from megatron_lowbit.codecs.peers.group_frame import Scaled

_BLOCK = 32


class Sdp4BitPlain(Scaled):
    """SDP4Bit without its rotation: int4 (8) in groups of 128, fp32 scale absmax / 7: 4.25 bits."""

    name = "sdp4bit-plain"
    format = "absmax"
    supported_bits = (4, 8)
    group = 128
    scale_dtype = torch.float32


class Sdp4Bit(Sdp4BitPlain):
    """SDP4Bit: `sdp4bit-plain` of what `rotate` gives; the sum is turned back: 4.25 bits.

    A NaN or an infinity spreads over its block of 32, which lies in its group.
    """

    name = "sdp4bit"
    format = "absmax-rotated"

    def _reference_encode(self, partial: Tensor) -> Tensor:
        return super()._reference_encode(rotate(partial.float()))

    def _reference_decode_sum(self, payloads: Tensor, hidden: int) -> Tensor:
        return turn_back(super()._reference_decode_sum(payloads, hidden))


def rotate(values: Tensor) -> Tensor:
    """fp32 ``[tokens, hidden]``, transformed in blocks of 32 and divided by the block's size.

    What is left of a row behind the last block is transformed in blocks of 16, 8, 4 and 2, as far
    as they go. The division, which the sources do at the end, comes first and step by step: so
    nothing overflows, and it costs no rounding of numbers that are not subnormal.
    """
    return _butterflies(values, 0.5)


def turn_back(values: Tensor) -> Tensor:
    """What `rotate` was given, but for roundings: fp32 ``[tokens, hidden]``."""
    return _butterflies(values, 1.0)


def _butterflies(values: Tensor, factor: float) -> Tensor:
    tokens, hidden = values.shape
    stride = 1
    while stride < _BLOCK:
        whole = hidden - hidden % (2 * stride)  # in blocks of at least two strides
        pairs = (values[:, :whole] * factor).view(tokens, whole // (2 * stride), 2, stride)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        mixed = torch.stack([first + second, first - second], dim=2).view(tokens, whole)
        values = torch.cat([mixed, values[:, whole:]], dim=1)
        stride *= 2
    return values
