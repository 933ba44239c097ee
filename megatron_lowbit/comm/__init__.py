"""Collectives: how the payloads of a codec travel, whatever the codec.

`all_reduce`, `reduce_scatter` and `all_gather` are the entries, a module each. `one_shot`,
`two_shot` and `hierarchical` move payload rows through `transport`, `symmetric_memory` through
memory that GPUs share; none knows what is in a row. `policy` says which way a message goes.
"""

from megatron_lowbit.comm.all_gather import all_gather
from megatron_lowbit.comm.all_reduce import all_reduce
from megatron_lowbit.comm.reduce_scatter import reduce_scatter

__all__ = ["all_gather", "all_reduce", "reduce_scatter"]
