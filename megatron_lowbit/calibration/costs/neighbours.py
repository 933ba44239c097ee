"""Which sync point takes whose errors: the next one in the chain of its model chunk."""

from collections.abc import Sequence

from megatron_lowbit.calibration.recipe import Key
from megatron_lowbit.model.summing import Placed


def following_of(points: Sequence[Placed]) -> dict[int, int]:
    """Number of a sync point -> of the one that takes its error."""
    last: dict[int, int] = {}  # by chunk
    following = {}
    for number, point in enumerate(points):
        if not point.apart:
            if point.chunk in last:
                following[last[point.chunk]] = number
            last[point.chunk] = number
    return following


def following_keys(points: Sequence[Placed]) -> dict[Key, Key]:
    """`following_of` by the keys that recipes have."""
    keys = [(point.layer, point.name) for point in points]
    return {keys[number]: keys[other] for number, other in following_of(points).items()}
