"""Collectives: how the payloads of a codec travel, whatever the codec.

`all_reduce`, `reduce_scatter` and `all_gather` are the entries, a module each. The ways of an
all-reduce (`one_shot`, `two_shot`, `hierarchical`, `symmetric_memory`) move payload rows through
`transport` and know nothing of what is in them. `policy` says which way a message goes.
"""

from megatron_lowbit.comm.all_gather import all_gather
from megatron_lowbit.comm.all_reduce import all_reduce
from megatron_lowbit.comm.reduce_scatter import reduce_scatter

__all__ = ["all_gather", "all_reduce", "reduce_scatter"]
