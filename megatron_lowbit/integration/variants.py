"""Variants by their names in the results, on the sync points of a model.

A variant is a codec (``rotated-hybrid``), a codec and bits (``rotated-hybrid-3``), a codec and the
bits of partials and sums (``rotated-hybrid-4+6``: two-shot, where the others are one-shot), or one
of the paper's baselines made from ``static-hybrid``: ``int4`` (no BF16 index) and ``int4-random``
(as many BF16 features, chosen at random).
"""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from megatron_lowbit.calibration.index import Index
from megatron_lowbit.codecs import Codec, Tables, get_codec, parse_codec
from megatron_lowbit.evaluation.run import Variant
from megatron_lowbit.evaluation.sync_error import Observer
from megatron_lowbit.integration.summing import CountingReducer, Summing
from megatron_lowbit.integration.sync_points import SyncPoint

TablesOf = Callable[[Index, SyncPoint, Codec, int], Tables]


def parse_variant(name: str) -> tuple[Codec, TablesOf]:
    """The codec of a variant's name, and how its tables are made.

    Raises:
        LowbitError: Unknown codec or number of bits.
    """
    if name == "int4":
        return get_codec("static-hybrid"), _tables_with(lambda index, point, k: [])
    if name == "int4-random":
        return get_codec("static-hybrid"), _tables_with(_random_features)
    codec = parse_codec(name)
    return codec, lambda index, point, codec, ranks: index.tables(
        point.layer, point.name, codec, ranks=ranks
    )


def collective_of(name: str) -> str:
    """By which collective a variant is measured: two-shot where its name has bits of the sum."""
    return "two-shot" if "+" in name else "one-shot"


class Variants:
    """The variants of one evaluation.

    Attributes:
        summing: How the model sums its partials.
        reducers: Variant -> a reducer for each sync point.
    """

    def __init__(self, chosen: dict[str, tuple[Codec, TablesOf]], summing: Summing, index: Index):
        self.summing = summing
        self.reducers: dict[str, list[CountingReducer]] = {}
        for name, (codec, tables_of) in chosen.items():
            self.reducers[name] = [
                summing.reducer(
                    point,
                    codec,
                    tables_of(index, point, codec, summing.ranks).to(point.module.weight.device),
                    collective_of(name),
                )
                for point in summing.points
            ]

    def all(self) -> list[Variant]:
        """As the evaluation loop takes them."""
        return [
            Variant(
                name,
                lambda reducers=reducers: self.summing.using(reducers),
                [reducer.traffic for reducer in reducers],
            )
            for name, reducers in self.reducers.items()
        ]

    def observing(self, observe: Observer) -> AbstractContextManager:
        """A context in which each sync point sums by all variants, too, for `SyncError`."""

        def watch(number: int, partial: Tensor, native: Tensor) -> None:
            exact = self.summing.exact(self.summing.points[number], partial)
            sums = {  # reducers may sum in place
                name: reducers[number](partial.clone(), False)
                for name, reducers in self.reducers.items()
            }
            observe(number, exact, sums)

        return self.summing.watching(watch)


def _tables_with(choose: Callable[[Index, SyncPoint, int], list[int]]) -> TablesOf:
    """Tables with the calibrated ranges and another BF16 index."""

    def tables_of(index: Index, point: SyncPoint, codec: Codec, ranks: int) -> Tables:
        count = len(index.bf16_index(point.layer, point.name, codec))
        chosen = choose(index, point, count)
        statistics = index.record(point.layer, point.name).statistics(ranks)
        return codec.tables(
            index.hidden,
            bf16_index=torch.tensor(chosen, dtype=torch.int64),
            statistics=statistics,
        )

    return tables_of


def _random_features(index: Index, point: SyncPoint, count: int) -> list[int]:
    """The same on every rank and in every run, another choice for each sync point."""
    return random.Random(str(point)).sample(range(index.hidden), count)
