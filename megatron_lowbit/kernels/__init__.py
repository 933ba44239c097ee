"""Kernels: the same bits as the plain-torch codecs, faster.

For CPUs, C compiled at first use on the user's machine (`build`) and called by ctypes
(`rotated_hybrid`); for GPUs, Triton (`triton_rotated`, `triton_static`, `triton_scaled`). Codecs
ask `select` for kernels and run their own plain-torch code where there are none; kernels know
nothing of codecs.
`describe()` says what runs; ``MEGATRON_LOWBIT_KERNELS=0`` in the environment or `disabled()` around
a call leaves all of them out.
"""

from megatron_lowbit.kernels.build import disabled
from megatron_lowbit.kernels.select import describe

__all__ = ["describe", "disabled"]
