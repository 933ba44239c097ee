"""Kernels: the same bits as the plain-torch codecs, faster.

    select        which kernels serve which tensors: C, Triton or none; codecs ask it
    switches      what a user switches: kernels at all, how the GPU's ones rotate
    cpu/          C, compiled at first use on the user's machine: the rotated family
    triton/       GPUs: rotated and carrying (with error feedback), static, scaled, grouped (peers'
                  formats and bf16), norm, symmetric
    layout        how a row is laid out; cells: how a code is found; peer_memory: shared blocks

Kernels know nothing of codecs. Codecs run their own plain torch where there are none.
`describe()` says what runs; ``MEGATRON_LOWBIT_KERNELS=0`` in the environment or `disabled()` around
a call leaves all of them out.

What a function of a family says nothing else of is here. Tables are contiguous, on the device of
the tensors. Partials, sums and carries may have any strides.

    partial         floating point ``[tokens, width]``; in Triton BF16, fp16 or fp32
    payloads        ``uint8 [ranks, tokens, row_bytes]``
    out             like a partial, ``[tokens, hidden]``: the sum is rounded into it; a new fp32
                    tensor if left out
    hidden, kept    features of a token; those of them that travel in BF16, *k*
    width           hidden, or k more with a body that the weight has rotated (`codecs.folding`)
    center          fp32 ``[hidden]``, subtracted before encoding, added after a sum; None: nothing
    scale           fp32 ``[hidden]``: encode multiplies each feature by it before the rotation,
                    decode_sum after it, 0 for the features of the index
    decode_scale    the scale of decode_sum, where a function has both
    bf16_index      int64 ``[k]``, each in ``[0, width)``; body_index: int64 ``[hidden - k]``, the
                    others
    block           values that the rotation mixes, a power of two that divides hidden
    thresholds      fp32 ``[2**bits - 1]``, ascending, of what is written
    levels          fp32 ``[2**bits]``, ascending
    bits            of a value, 1 to 6; body_bytes: of the packed codes of a row
    sum_*           the same of what reduce_encode writes
    taken           floating point ``[tokens, hidden]``: the carry that is added; None: nothing
    given           BF16 ``[tokens, hidden]``: where the error goes, which may be `taken`; None:
                    nothing is kept
    bounded         int64 ``[1]``, counts rows whose error was scaled down; None: nothing is counted
    largest         the most that the error of a row may be (`codecs.carry`)

encode and reduce_encode return ``uint8 [tokens, row_bytes]``, contiguous, decode_sum `out`. All
raise LowbitError where a tensor has another shape or type, or a row has too many features.
"""

from megatron_lowbit.kernels.select import describe
from megatron_lowbit.kernels.switches import disabled

__all__ = ["describe", "disabled"]
