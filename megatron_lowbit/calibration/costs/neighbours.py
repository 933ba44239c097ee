"""Which sync point takes whose errors: the next one in the chain of its model chunk."""

from collections.abc import Sequence
from itertools import pairwise

from megatron_lowbit.calibration.recipe import Key
from megatron_lowbit.model.summing import Placed, chains


def following_of(points: Sequence[Placed]) -> dict[int, int]:
    """Number of a sync point -> of the one that takes its error."""
    return {number: after for chain in chains(points) for number, after in pairwise(chain)}


def following_keys(points: Sequence[Placed]) -> dict[Key, Key]:
    """`following_of` by the keys that recipes have."""
    keys = [(point.layer, point.name) for point in points]
    return {keys[number]: keys[other] for number, other in following_of(points).items()}
