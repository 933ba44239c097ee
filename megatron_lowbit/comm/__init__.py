"""Collectives: how the payloads of a codec travel, whatever the codec.

`all_reduce`, `reduce_scatter` and `all_gather` are the entries. Each algorithm is a module of its
own that moves payload rows through `transport` and knows nothing of what is in them; `choice` says
which one a message goes by, from measured times (`tuning`) or a `cost_model` with figures from a
`probe`.
"""

from megatron_lowbit.comm.all_reduce import all_gather, all_reduce, reduce_scatter

__all__ = ["all_gather", "all_reduce", "reduce_scatter"]
