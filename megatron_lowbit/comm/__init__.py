"""Collectives: how the payloads of a codec travel, whatever the codec.

`all_reduce` is the one entry; each algorithm is a module of its own that moves payloads and knows
nothing of what is in them.
"""

from megatron_lowbit.comm.all_reduce import all_reduce

__all__ = ["all_reduce"]
