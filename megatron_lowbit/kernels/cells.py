"""The table by which the Triton kernels find a code without comparing with every threshold.

The line is cut into cells of equal width, a power of two so small that no cell has two thresholds.
A cell knows how many thresholds lie in lower cells, and its own one if it has one: a code is that
number, plus one for a value above the threshold. Finding the cell rounds, but monotonically, and
the thresholds were put into cells by the same operations: so the codes are exactly those of all
comparisons. 4 bits have 22 cells, 6 bits 114.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cells:
    """A table for `parts.values.quantize`.

    Attributes:
        table: int64 ``[cells]``: the count above, the bits of the threshold (or infinity) below.
        steps: Cells a unit.
    """

    table: Tensor
    steps: int


@lru_cache
def cells(thresholds: Tensor) -> Cells:
    """The table of fp32 ``[n]`` ascending `thresholds`, on their device.

    Made once for a tensor, which is told by its identity and kept; the first call waits for the
    device.
    """
    on_host = thresholds.cpu()
    for steps in (2**power for power in range(20)):
        half = int(on_host.abs().max() * steps) + 2  # the outermost cells have no threshold
        place = (on_host * steps + half).to(torch.int64)
        if len(place.unique()) == len(place):
            break
    else:
        raise AssertionError(f"thresholds less than a millionth apart: {on_host.tolist()}")
    own = torch.full((2 * half,), torch.inf)
    own[place] = on_host
    below = torch.searchsorted(place, torch.arange(2 * half))
    table = below << 32 | (own.view(torch.int32).to(torch.int64) & 0xFFFFFFFF)
    return Cells(table.to(thresholds.device), steps)
