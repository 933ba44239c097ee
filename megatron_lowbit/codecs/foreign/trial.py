"""What a codec is tried on: the partials of a few ranks, and what it makes of them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_lowbit.codecs.base import Codec
from megatron_lowbit.codecs.tables import Statistics, Tables

TOKENS = 7
_ZERO = 3  # a token that is all zeros: it has no scale
_ENOUGH = 48  # features from which on an average over them says something


@dataclass(frozen=True)
class Case:
    """A codec with the partials of a few ranks, which are the same in every run.

    Attributes:
        codec: What is checked.
        hidden: Features of a token.
        dtype: Of the partials.
        ranks: How many have a partial.
    """

    codec: Codec
    hidden: int
    dtype: torch.dtype
    ranks: int

    def __str__(self) -> str:
        return f"hidden {self.hidden}, {self.dtype}, ranks {self.ranks}"

    @cached_property
    def partials(self) -> Tensor:
        """``[ranks, tokens, hidden]``: normal, features of several sizes, one token zero."""
        generator = torch.Generator().manual_seed(self.hidden)
        shape = (self.ranks, TOKENS, self.hidden)
        values = torch.randn(shape, generator=generator, device="cpu")
        values *= torch.rand(self.hidden, generator=generator, device="cpu") + 0.5
        values[:, _ZERO] = 0
        return values.to(self.dtype)

    @cached_property
    def tables(self) -> Tables:
        """Of the partials' own statistics."""
        statistics = Statistics.of(self.partials)
        assert statistics.ranges is not None
        count = self.codec.default_bf16_features(self.hidden) if self.codec.takes_index else 0
        index = statistics.ranges.sum(dim=0).argsort(descending=True)[:count]
        return self.codec.tables(self.hidden, bf16_index=index, statistics=statistics, device="cpu")

    def encode(self, partials: Tensor) -> Tensor:
        """The payloads of all ranks: ``[ranks, tokens, row_bytes]``."""
        each = [self.codec.encode(p, self.tables, rank=r) for r, p in enumerate(partials)]
        return torch.stack(each)

    @cached_property
    def payloads(self) -> Tensor:
        """Of `partials`."""
        return self.encode(self.partials)

    @cached_property
    def total(self) -> Tensor:
        """Their sum."""
        return self.codec.decode_sum(self.payloads, self.tables)


def far_off(case: Case, exact: Tensor, got: Tensor) -> str:
    """That `got` is as wrong as if nothing had been sent, or worse."""
    if not got.isfinite().all():
        return "is not finite"
    error, size = (got.double() - exact.double()).norm(), exact.double().norm()
    if case.hidden >= _ENOUGH and error >= size:
        return f"is off by {error / size:.2f} of its own size"
    return ""


def same(one: Tensor, other: Tensor) -> bool:
    """Whether shape and values are equal, NaN being no value."""
    return one.shape == other.shape and torch.equal(one, other)
