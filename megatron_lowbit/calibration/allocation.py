"""Spending bits along a chain of sync points whose errors meet.

With error feedback a sync point sends its own partial and what the one before it left, and misses a
share of both. So what it costs depends on its own choice and on its neighbour's:

    total = sum over points of  own[choice] + missed[choice] * handed_on[choice of the one before]

The best choices for a price of a bit are found exactly by dynamic programming along the chain
(Viterbi, IEEE Trans. IT-13, 1967). The price is the lowest that stays within the budget (Everett,
Operations Research 11, 1963; Shoham and Gersho, IEEE Trans. ASSP 36, 1988). What it leaves of the
budget goes to the single changes that save most for their bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_PRICES = (-60.0, 40.0)  # of the dearest option a bit, as powers of two
_HALVINGS = 50


@dataclass(frozen=True)
class Terms:
    """What can be chosen at each point and what it costs, all fp64 ``[points, options]``.

    Attributes:
        bits: Bits a value.
        own: Nats; infinity where an option is not to be had.
        handed_on: Nats that the next point would cost more if it missed all that it takes.
        missed: The share of what it takes that a point misses.
        takes: Of each point: whether it takes what the one before it left.
    """

    bits: Tensor
    own: Tensor
    handed_on: Tensor
    missed: Tensor
    takes: Sequence[bool]

    def total(self, chosen: Sequence[int]) -> float:
        """Nats of a choice for every point."""
        return sum(
            (self.own[n, c] + self._between(n)[chosen[n - 1], c]).item()
            for n, c in enumerate(chosen)
        )

    def average(self, chosen: Sequence[int]) -> float:
        """Bits a value of a choice for every point."""
        return self.bits[range(len(chosen)), list(chosen)].mean().item()

    def _between(self, number: int) -> Tensor:
        """``[options of the point before, options]``: nats for what it takes."""
        if not self.takes[number]:
            return self.own.new_zeros(self.own.shape[1], 1).expand(-1, self.own.shape[1])
        return self.handed_on[number - 1][:, None] * self.missed[number]

    def best(self, price: float) -> list[int]:
        """The choices of least nats if a bit costs `price` of them."""
        own = self.own + price * self.bits
        least, origins = own[0], []
        for number in range(1, len(own)):
            least, origin = (least[:, None] + self._between(number)).min(dim=0)
            least = least + own[number]
            origins.append(origin)
        chosen = [int(least.argmin())]
        for origin in reversed(origins):
            chosen.append(int(origin[chosen[-1]]))
        return chosen[::-1]


def spend(terms: Terms, budget: float) -> list[int]:
    """The option of each point: least nats within `budget` bits a value on average.

    It must be within reach: the cheapest options take no more.
    """
    dearest = max(terms.own[terms.own.isfinite()].max().item(), terms.handed_on.max().item()) or 1.0
    low, high = _PRICES
    chosen = terms.best(dearest * 2.0**high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = terms.best(dearest * 2.0**middle)
        if terms.average(found) <= budget + 1e-9:
            chosen, high = found, middle
        else:
            low = middle
    return _with_the_rest(terms, chosen, budget)


def _with_the_rest(terms: Terms, chosen: list[int], budget: float) -> list[int]:
    """`chosen` with what is left of the budget spent."""
    chosen, bits = list(chosen), terms.bits.tolist()
    left = (budget + 1e-9) * len(bits) - sum(row[c] for row, c in zip(bits, chosen, strict=True))
    while True:
        steps = []
        for number, now in enumerate(chosen):
            saved = _saved(terms, chosen, number)
            for option, gain in enumerate(saved):
                more = bits[number][option] - bits[number][now]
                if 0 < more <= left and gain > 0:
                    steps.append((gain / more, number, option, more))
        if not steps:
            return chosen
        _, number, option, more = max(steps, key=lambda step: step[0])
        chosen[number] = option
        left -= more


def _saved(terms: Terms, chosen: list[int], number: int) -> list[float]:
    """Nats that each option of one point would save, all others as they are."""
    nats = terms.own[number] + terms._between(number)[chosen[number - 1]]
    if number + 1 < len(chosen):
        nats = nats + terms._between(number + 1)[:, chosen[number + 1]]
    return (nats[chosen[number]] - nats).tolist()
