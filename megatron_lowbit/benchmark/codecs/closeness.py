"""Whether results of another rotation are close enough to those of the butterflies.

Codes may differ by one step in one value of 10,000, and the signal to noise ratio of a sum by
0.01 dB.
"""

import torch
from torch import Tensor

from megatron_lowbit.codecs import Codec, Tables, wire

MOST_CODES = 1e-4
MOST_DECIBELS = 0.01
_FEW = 3  # codes of a payload of less than 30,000 values, where a share says little


def moved_codes(got: Tensor, expected: Tensor, codec: Codec, tables: Tables) -> Tensor:
    """Steps between the codes of two payloads: int32 ``[tokens, hidden]``, none below zero.

    They are ``uint8 [tokens, row_bytes]`` of a codec with the body of all features.
    """
    body = wire.packed_bytes(tables.hidden, codec.bits)
    codes = (wire.unpack(x[:, :body], codec.bits, tables.hidden) for x in (got, expected))
    return torch.sub(*codes).abs()


def codes_apart(got: Tensor, expected: Tensor, codec: Codec, tables: Tables) -> str:
    """What is too far apart in two payloads, see `moved_codes`; empty if nothing is."""
    steps = moved_codes(got, expected, codec, tables)
    if steps.numel() and steps.max() > 1:
        return f"a code differs by {steps.max()} steps"
    count = int(steps.count_nonzero())
    if count > max(MOST_CODES * steps.numel(), _FEW):
        return f"{count} codes of {steps.numel()} differ"
    return ""


def sums_apart(got: Tensor, expected: Tensor, exact: Tensor) -> str:
    """What is too far apart in two sums of the same shape as the `exact` one; empty if nothing."""
    ratios = [sqnr(exact, x) for x in (got, expected)]
    if not abs(ratios[0] - ratios[1]) <= MOST_DECIBELS:
        return f"a signal to noise ratio of {ratios[0]:.3f} dB, not {ratios[1]:.3f} dB"
    return ""


def sqnr(exact: Tensor, approximate: Tensor) -> float:
    """Signal to quantization noise ratio in dB, over all values."""
    noise = (exact.double() - approximate.double()).square().sum()
    return (10 * torch.log10(exact.double().square().sum() / noise)).item()
