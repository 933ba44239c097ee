"""Trellis-coded quantization: twice the levels at the same bits, by a code over the whole row.

Source: Marcellin and Fischer, "Trellis Coded Quantization of Memoryless and Gauss-Markov Sources",
IEEE Trans. Communications 38, 1990; 8 states, with Ungerboeck's parity checks 13 and 04 (octal).

There are 2**(bits+1) levels, dealt in turn to four subsets D0 D1 D2 D3 D0 ... A value's code is
2 m + x: x is one bit that drives a shift register of three, m the place of the level in its subset.
The register picks the subset: 2 (x[i] ^ x[i-1] ^ x[i-3]) + x[i-2]. So after any history either D0
and D2 or D1 and D3 can be reached, 2**bits levels, but a whole row can take whichever history
fits it best, which the Viterbi algorithm finds. Reading needs no search: a value depends on its own
code and the three before it.

Levels: Lloyd's iteration from Lloyd-Max levels of one bit more, 40 rounds of 768 x 576 Gaussian
values. Signal to quantization noise: 10.67 dB at 2 bits, 16.29 dB at 3, 21.99 dB at 4; with 64
states instead of 8 it is 0.2 dB more.
"""

from functools import lru_cache

import torch
from torch import Tensor

_STATES = 8  # the last three x, the newest in the lowest bit
_POSITIVE_LEVELS = {
    2: (0.1921, 0.6015, 1.0686, 1.8660),
    3: (0.1097, 0.3137, 0.5430, 0.7750, 1.0449, 1.3619, 1.8072, 2.5023),
    4: (
        *(0.0628, 0.1811, 0.3074, 0.4289, 0.5592, 0.6869, 0.8242, 0.9628),
        *(1.1130, 1.2714, 1.4478, 1.6473, 1.8869, 2.1834, 2.5706, 3.1609),
    ),
}


@lru_cache
def levels(bits: int, device: torch.device) -> Tensor:
    """fp32 ``[2**(bits+1)]``, ascending; level 4 m + j is number m of subset j."""
    positive = torch.tensor(_POSITIVE_LEVELS[bits])
    return torch.cat([-positive.flip(0), positive]).to(device)


def quantize(values: Tensor, bits: int) -> Tensor:
    """Codes, int32 ``[tokens, hidden]``, of the path with the least squared error; fp32 in."""
    places, costs = _nearest_of_subsets(values, bits)
    choices, state = _search(costs)
    codes = torch.empty(values.shape, dtype=torch.int64, device=values.device)
    for i in range(values.shape[1] - 1, -1, -1):  # back along the best path
        older = choices[i].gather(1, state)
        bit, previous = state & 1, (state >> 1) | (older << 2)
        subset = _subset(bit, previous)
        codes[:, i : i + 1] = 2 * places[:, i].gather(1, subset) + bit
        state = previous
    return codes.int()


def dequantize(codes: Tensor, bits: int) -> Tensor:
    """fp32 levels of integer `codes` ``[tokens, hidden]``."""
    hidden = codes.shape[1]
    driver = torch.nn.functional.pad(codes & 1, (3, 0))
    last, second, third = (driver[:, 3 - ago : 3 - ago + hidden] for ago in (1, 2, 3))
    history = last | (second << 1) | (third << 2)
    subset = _subset(codes & 1, history)
    return levels(bits, codes.device)[4 * (codes >> 1) + subset]


def _subset(bit: Tensor, state: Tensor) -> Tensor:
    """The subset that `bit` leads to from a state."""
    return 2 * ((bit ^ state ^ (state >> 2)) & 1) + ((state >> 1) & 1)


def _nearest_of_subsets(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """For each value and subset the nearest level's place in it, and its squared distance."""
    places, costs = [], []
    for subset in range(4):
        own = levels(bits, values.device)[subset::4].contiguous()
        place = torch.bucketize(values, (own[1:] + own[:-1]) / 2)
        places.append(place)
        costs.append((values - own[place]).square())
    return torch.stack(places, dim=-1), torch.stack(costs, dim=-1)


def _search(costs: Tensor) -> tuple[list[Tensor], Tensor]:
    """For each value and state whether its better predecessor has the oldest bit set; the end.

    Args:
        costs: fp32 ``[tokens, hidden, 4]``.

    Returns:
        int64 0 or 1, a ``[tokens, 8]`` for each value, and the best last state ``[tokens, 1]``.
    """
    state = torch.arange(_STATES, device=costs.device)
    previous = [state >> 1, (state >> 1) | (_STATES >> 1)]
    branches = [costs[..., _subset(state & 1, one)] for one in previous]
    total = torch.full((len(costs), _STATES), torch.inf, device=costs.device)
    total[:, 0] = 0  # the register starts empty
    choices = []
    for i in range(costs.shape[1]):
        low, high = (
            total[:, one] + cost[:, i] for one, cost in zip(previous, branches, strict=True)
        )
        choices.append((high < low).long())
        total = torch.minimum(low, high)
    return choices, total.argmin(dim=1, keepdim=True)
