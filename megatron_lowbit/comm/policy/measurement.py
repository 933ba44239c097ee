"""Collectives timed on the group that will use them, in a few seconds when a model is loaded.

What is timed is what will run: `all_reduce` and `reduce_scatter` themselves, with the model's own
codecs and tables, carries taken and given, over symmetric memory where messages go that way. They
are timed in rounds (`comm.policy.rounds`). Counters, carries of the model and random numbers are
left alone.

On a GPU the times are those on the stream, of calls that no CUDA graph holds. What it costs to
launch a call is in them, which is more for low bits than for native.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.comm.all_reduce import all_reduce
from megatron_lowbit.comm.feedback.chain import ErrorFeedback
from megatron_lowbit.comm.policy.policy import Policy
from megatron_lowbit.comm.policy.rounds import Family
from megatron_lowbit.comm.policy.runs import Calls, Place
from megatron_lowbit.comm.policy.timings import (
    BF16_BYTES,
    NATIVE,
    NATIVE_SCATTER,
    Case,
    Kind,
    Rounds,
    Timings,
)
from megatron_lowbit.comm.reduce_scatter import reduce_scatter
from megatron_lowbit.comm.transport import native_reduce_scatter

# At load: with what starts and ends it, 5 s at the most.
SECONDS, ROUNDS = 4.3, 48
# A message of a token, then four times as long each.
_GROWTH = 4


def time_collectives(
    kinds: Sequence[Kind],
    place: Place,
    *,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
    sizes: Sequence[int] | None = None,
) -> Timings:
    """Time native and low bits; call it on every rank of the group alike.

    Args:
        kinds: Sync points of a pass, all of one hidden size.
        place: Where.
        seconds: For all of it.
        rounds: Of a size, at the most.
        sizes: Bytes of the messages in BF16, rounded down to whole tokens (at least one), however
            long they take. If left out, in steps of 4 from one token on, as far as there is time.

    Returns:
        The same times on every rank: the means over ranks.
    """
    hidden, ranks = kinds[0].tables.hidden, dist.get_world_size(place.group)
    families: list[tuple[Callable[[], Calls], int]] = [(partial(_all_reduces, kinds, place), 1)]
    if place.scatters:
        families.append((partial(_scatters, kinds, place), ranks))
    found: dict[Case, dict[int, Rounds]] = {}
    for make_calls, multiple in families:
        family = Family(make_calls, kinds, place)
        tokens = _tokens(sizes, hidden, multiple, place.largest)
        family.measure(tokens, seconds / len(families), rounds, all_sizes=sizes is not None)
        found |= family.timings.times
    return Timings(found)


def _tokens(sizes: Sequence[int] | None, hidden: int, multiple: int, largest: int) -> list[int]:
    """Of each message, ascending; `multiple` ranks divide them."""
    row = BF16_BYTES * hidden * multiple
    if sizes is not None:
        return sorted({max(size // row, 1) * multiple for size in sizes})
    tokens = [multiple]
    while tokens[-1] // multiple * _GROWTH * row <= largest:
        tokens.append(tokens[-1] * _GROWTH)
    return tokens


def _all_reduces(kinds: Sequence[Kind], place: Place) -> Calls:
    """In place, as Megatron's own."""
    group = place.group
    calls: Calls = {Case("", False, NATIVE): lambda x: dist.all_reduce(x, group=group)}
    for collective, policy in place.policies.items():
        call = partial(all_reduce, collective=policy, in_place=True)
        calls |= _of_kinds(call, kinds, collective, place)
    return calls


def _scatters(kinds: Sequence[Kind], place: Place) -> Calls:
    group, ranks = place.group, dist.get_world_size(place.group)

    def native(x: Tensor) -> None:
        out = x.new_empty(len(x) // ranks, *x.shape[1:])
        native_reduce_scatter(out, x, group=group)

    call = partial(reduce_scatter, collective=Policy("one-shot"))
    low_bits = _of_kinds(call, kinds, "reduce-scatter", place)
    return {Case("", False, NATIVE_SCATTER): native, **low_bits}


def _of_kinds(
    call: Callable[..., Tensor], kinds: Sequence[Kind], collective: str, place: Place
) -> Calls:
    """`call` as the sync points of a pass make it: each takes what the one before it gave."""
    feedback = ErrorFeedback()
    return {
        kind.case(collective): partial(
            call,
            group=place.group,
            codec=kind.codec,
            tables=kind.tables.to(place.device),
            feedback=feedback if kind.carries else None,
        )
        for kind in kinds
    }
