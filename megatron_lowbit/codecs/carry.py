"""Error feedback: what one quantization missed, sent along with the next.

Sync points add to one residual stream, so what rank r failed to send at one of them it can send at
the next:

    x = partial + taken            fp32; `taken` is nothing at the first sync point of a pass
    payload = encode(x)
    given = x - decode(payload)    kept on rank r in BF16, never on the wire

All errors but the last are repaired one sync point later. The sum of a two-shot all-reduce is
quantized once more, and its owner carries that error in the same way, added to the fp32 sum before
it is encoded. It is the error feedback of gradient compression (1-bit SGD, Seide et al.,
Interspeech 2014), over layers instead of training steps.

**Where it rounds** (the specification): the partial and the carry are turned into fp32 and added,
one rounding; the codec encodes that fp32 value; the error is the fp32 difference to what the codec
decodes from this rank's payload alone; it is rounded to BF16 when it is kept.

**Bound.** A codec that misses a row by about the row's own size never catches up, and its carry
would grow from sync point to sync point. So a row's error is kept within `LARGEST` of the row it
was made from, by squares summed in the tree of `rotation.sum_of_squares`; it is scaled down to that
where it is larger. A carry then stays below LARGEST / (1 - LARGEST) = 3 of the largest partial. A
sync point of 0 bits is not bounded: its error is the row itself, and the next one sends it.

A NaN or an infinity in a row makes the row's carry NaN. So it reaches all ranks even where nothing
is sent, and stays in its token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lowbit.codecs import rotation

# Of a row: at 1 bit the error is 0.60 of it, at 2 bits 0.34, if the row is Gaussian.
LARGEST = 0.75


class Carry(NamedTuple):
    """What one quantization takes from the last one and gives to the next.

    Attributes:
        taken: Floating point ``[tokens, hidden]``, added to what is to be sent; None for nothing.
        given: BF16 ``[tokens, hidden]``, where the new error goes; None where nothing takes it. It
            may be the memory of `taken`.
        bounded: int64 ``[1]``: how many rows were scaled down, added up; None to count nothing.
    """

    taken: Tensor | None = None
    given: Tensor | None = None
    bounded: Tensor | None = None

    def rows(self, start: int, stop: int) -> "Carry":
        """The carry of tokens ``[start, stop)``."""
        taken = None if self.taken is None else self.taken[start:stop]
        return Carry(taken, None if self.given is None else self.given[start:stop], self.bounded)

    def added_to(self, values: Tensor) -> Tensor:
        """fp32: `values` and what is taken."""
        return values.float() if self.taken is None else values.float() + self.taken.float()

    def keep(self, wanted: Tensor, sent: Tensor, *, bound: bool = True) -> None:
        """Keep what was to be sent and was not.

        Args:
            wanted: fp32 ``[tokens, hidden]``, from `added_to`.
            sent: fp32 ``[tokens, hidden]``, what the payload stands for.
            bound: Whether a row's error is kept within `LARGEST` of the row.
        """
        if self.given is None:
            return
        error = wanted - sent
        if bound:
            error = self._bounded(error, wanted)
        self.given.copy_(error)

    def _bounded(self, error: Tensor, wanted: Tensor) -> Tensor:
        most = LARGEST * rotation.root_mean(rotation.sum_of_squares(wanted), 1)
        size = rotation.root_mean(rotation.sum_of_squares(error), 1)
        is_large = size > most
        if self.bounded is not None:
            self.bounded.add_(is_large.sum())
        return torch.where(is_large, error * (most / size), error)


NO_CARRY = Carry()
