"""The cases that tests and benchmarks share: codecs, shapes, input distributions."""

from collections.abc import Iterable

import torch
from torch import Tensor

# Shared with the check on a GPU, which runs where there are no tests.
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import DTYPES as DTYPES
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import OUTLIER as OUTLIER
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import sample as sample
from megatron_lowbit.codecs import Codec, Statistics, Tables, get_codec

CODECS = [
    ("bf16", 16),
    ("static-hybrid", 4),
    ("scaled-hybrid", 4),
    ("scaled-hybrid", 3),
    ("rotated-hybrid", 4),
    ("rotated-hybrid", 3),
    ("rotated-hybrid", 2),
    ("shaped-hybrid", 4),
    ("shaped-hybrid", 3),
    ("int4-g32", 4),
    ("int4-g16", 4),
    ("int4-g32-asym", 4),
    ("int4-g128-asym", 4),
    ("spike-g32", 4),
    ("spike-g32", 3),
    ("spike-g32", 2),
    ("mxfp4", 4),
    ("nvfp4", 4),
    ("int8-token", 8),
    ("fp8-g256", 8),
    ("int8-g32", 8),
    ("sdp4bit", 4),
    ("sdp4bit-plain", 4),
]

# No token, one, fewer than ranks, odd sizes, a block of 64, several leading dimensions.
SHAPES = [(0, 64), (1, 64), (2, 33), (3, 1), (5, 576), (4, 2, 48)]


def tables_for(codec: Codec, partials: list[Tensor], bf16_features: int) -> Tables:
    """Tables with statistics of the partials themselves and the largest features in BF16."""
    hidden = partials[0].shape[-1]
    stacked = torch.stack([p.float().reshape(-1, hidden) for p in partials]).nan_to_num(0, 0, 0)
    if not stacked.shape[1]:
        stacked = stacked.new_zeros(len(partials), 1, hidden)
    statistics = Statistics.of(stacked)
    index = statistics.ranges.sum(dim=0).argsort(descending=True)[:bf16_features]
    return codec.tables(hidden, bf16_index=index, statistics=statistics)


def payloads_of(codec: Codec, partials: Iterable[Tensor], tables: Tables) -> Tensor:
    """Of each rank's partial, ``[tokens, hidden]``: uint8 ``[ranks, tokens, row_bytes]``."""
    return torch.stack([codec.encode(p, tables, rank=r) for r, p in enumerate(partials)])


def reference_sum(codec: Codec, partials: Iterable[Tensor], tables: Tables) -> Tensor:
    """What a one-shot sum must give, computed in one process: fp32 ``[tokens, hidden]``."""
    return codec.decode_sum(payloads_of(codec, partials, tables), tables)


def through(codec: Codec, values: Tensor, tables: Tables | None = None) -> Tensor:
    """One partial encoded and decoded; by default with tables of no statistics."""
    return reference_sum(codec, [values], tables or codec.tables(values.shape[1]))


def all_codecs() -> list[Codec]:
    return [get_codec(name, bits=bits) for name, bits in CODECS]
