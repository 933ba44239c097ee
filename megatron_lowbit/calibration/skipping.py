"""Which sync points send nothing: what tools/calibrate.py --skip does."""

from collections.abc import Sequence
from itertools import product

from megatron_lowbit.calibration.plan import SKIP, Options
from megatron_lowbit.calibration.recipe import Key
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.model.summing import Placed, chains

_Cheapest = dict[int, tuple[float, tuple[Key, ...]]]  # how many are skipped -> their cost, and they


def choose_skipped(options: Options, points: Sequence[Placed], count: int) -> frozenset[Key]:
    """The sync points that cost least to skip: never two neighbours in a chain, never its end.

    What a skipped one leaves is sent by the next one, whose error grows with what it has to send.

    Args:
        options: Of each sync point, at their cost with feedback.
        points: The sync points, in call order.
        count: How many to skip.

    Raises:
        LowbitError: So many cannot be skipped.
    """
    costs = {
        key: next(o.divergence for o in of_point if o.assignment == SKIP)
        for key, of_point in options.items()
    }
    cheapest: _Cheapest = {0: (0.0, ())}
    for chain in chains(points):
        of_chain = _cheapest([(points[n].layer, points[n].name) for n in chain[:-1]], costs)
        combined: _Cheapest = {}
        for (m, (cost, keys)), (n, (more, others)) in product(cheapest.items(), of_chain.items()):
            found = (cost + more, (*keys, *others))
            combined[m + n] = min(combined.get(m + n, found), found)
        cheapest = combined
    if count not in cheapest:
        outside = next((f" ({p.apart})" for p in points if p.apart), "")
        raise LowbitError(
            f"--skip {count}: {max(cheapest)} of {len(points)} sync points can be skipped, never "
            f"two neighbours, never the last one that carries errors, none that does not{outside}"
        )
    return frozenset(cheapest[count][1])


def _cheapest(keys: list[Key], costs: dict[Key, float]) -> _Cheapest:
    """Of a chain without its end, for each number of skipped ones, never two neighbours."""
    kept: _Cheapest = {0: (0.0, ())}  # the last key was kept
    skipped: _Cheapest = {}
    for key in keys:
        skipping = {n + 1: (c + costs[key], (*chosen, key)) for n, (c, chosen) in kept.items()}
        kept = {n: min(t[n] for t in (kept, skipped) if n in t) for n in {*kept, *skipped}}
        skipped = skipping
    return {n: min(t[n] for t in (kept, skipped) if n in t) for n in {*kept, *skipped}}
