"""The values of a group that ``spike-g32`` sends apart: its largest and its least.

Two BF16 values a group, and behind those of all groups two bytes a group for their places; the
first ones where there are several, which of NaNs are the first NaN. The bits are those of
`codecs.peers.asymmetric_groups`. A tile is ``[groups, features]``; the kernels are those of
`grouped`.
"""

import triton
import triton.language as tl

from megatron_lowbit.kernels.triton.parts import values as parts


@triton.jit
def write(values, numbers, group, GROUPS: tl.constexpr):
    """Write the spikes of a row.

    Args:
        values: fp32 [groups, features].
        numbers: The bytes of the row where the spikes are.
        group: int32 [groups], 0, 1, ...
        GROUPS: How many are real.

    Returns:
        fp32 [groups, features]: another value of the group in the place of a spike; NaN in all of
        a group in which one is not finite.
    """
    high, high_at = _first(values)
    low, low_at = _first(-values)
    finite = (tl.abs(high) < float("inf")) & (tl.abs(low) < float("inf"))
    _store(numbers, group, GROUPS, 0, tl.where(finite, high, float("nan")), high_at)
    _store(numbers, group, GROUPS, 1, tl.where(finite, -low, float("nan")), low_at)
    place = tl.arange(0, values.shape[1])[None, :]
    other_at = _not_among(high_at, low_at)
    other = tl.sum(tl.where(place == other_at[:, None], values, 0.0), axis=1)
    spike = (place == high_at[:, None]) | (place == low_at[:, None])
    rest = tl.where(spike, other[:, None], values)
    return tl.where(finite[:, None], rest, float("nan"))


@triton.jit
def put_back(values, numbers, group, GROUPS: tl.constexpr):
    """`values` with the spikes in their places; arguments as for `write`."""
    place = tl.arange(0, values.shape[1])[None, :]
    for which in tl.static_range(2):
        spike = parts.load_bf16(numbers + 4 * group + 2 * which, group < GROUPS)
        at = tl.load(numbers + 4 * GROUPS + 2 * group + which, mask=group < GROUPS)
        values = tl.where(place == at.to(tl.int32)[:, None], spike[:, None], values)
    return values


@triton.jit
def _first(values):
    """The largest value of each group, NaN if it has one, and the first place that it is in."""
    nan = values != values
    largest = tl.max(tl.where(nan, float("inf"), values), axis=1)
    has_nan = tl.max(nan.to(tl.int32), axis=1) != 0
    here = tl.where(has_nan[:, None], nan, values == largest[:, None])
    size: tl.constexpr = values.shape[1]
    place = tl.where(here, tl.arange(0, size)[None, :], size)
    return tl.where(has_nan, float("nan"), largest), tl.min(place, axis=1)


@triton.jit
def _not_among(one, other):
    """The first place that is none of these two."""
    second = tl.where((one != 1) & (other != 1), 1, 2)
    return tl.where((one != 0) & (other != 0), 0, second)


@triton.jit
def _store(numbers, group, GROUPS: tl.constexpr, WHICH: tl.constexpr, spike, at):
    spike = tl.where(spike == 0, 0.0, spike)  # no negative zero
    parts.store_bytes(numbers + 4 * group + 2 * WHICH, parts.wire_bits(spike), group < GROUPS, 2)
    places = numbers + 4 * GROUPS + 2 * group + WHICH
    tl.store(places, at.to(tl.uint8), mask=group < GROUPS)
