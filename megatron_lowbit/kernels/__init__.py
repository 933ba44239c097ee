"""Kernels: the same bits as the plain-torch codecs, faster.

For CPUs, C compiled at first use on the user's machine (`build`) and called by ctypes
(`rotated_hybrid`). Codecs call kernels where they can and run their own plain-torch code elsewhere;
kernels know nothing of codecs. `describe()` says what runs; ``MEGATRON_LOWBIT_KERNELS=0`` in the
environment or `disabled()` around a call leaves them out.
"""

from megatron_lowbit.kernels.build import describe, disabled

__all__ = ["describe", "disabled"]
