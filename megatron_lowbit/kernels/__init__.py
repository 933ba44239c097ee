"""Kernels: the same bits as the plain-torch codecs, faster.

    select        which kernels serve which tensors: C, Triton or none; codecs ask it
    switches      what a user switches: kernels at all, how the GPU's ones rotate
    cpu/          C, compiled at first use on the user's machine: the rotated family
    triton/       GPUs: rotated and carrying (with error feedback), static, scaled, grouped (peers'
                  formats and bf16), norm, symmetric
    layout        a row, in one dict; cells: how a code is found; peer_memory: shared blocks

Kernels know nothing of codecs. Codecs run their own plain torch where there are none.
`describe()` says what runs; ``MEGATRON_LOWBIT_KERNELS=0`` in the environment or `disabled()` around
a call leaves all of them out.
"""

from megatron_lowbit.kernels.select import describe
from megatron_lowbit.kernels.switches import disabled

__all__ = ["describe", "disabled"]
