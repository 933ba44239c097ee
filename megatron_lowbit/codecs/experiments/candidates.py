"""Codecs that the search for better ones tried and did not keep, so that anyone can try them again.

Each is `shaped-hybrid` with one thing changed, with really packed payloads of the same size. They
are measured like any codec (``python -m megatron_lowbit evaluate --codecs try-vector ...``) and
cannot be served with: `CODECS` does not have them.

The figures are the signal to quantization noise of what is rotated, on a Gaussian, at 4 / 3 / 2
bits. `shaped-hybrid` has 20.22 / 14.62 / 9.30 dB (`codecs.codebook`). No fixed-rate code gets
beyond 24.08 / 18.06 / 12.04, the rate-distortion bound.

Not here: entropy coding. A uniform quantizer with an ideal entropy coder has 22.55 dB at 4.0 bits,
but a row's length would depend on its values. To fit a row of a fixed size, its step must be
searched for, and it is read value after value; a trellis comes close without either.

Nor is there one for attention sinks: the first token of a sequence, whose partials are 400 times
the others' at one sync point of SmolLM2-135M and dozens of times at a few more. A scale per token
keeps that from the other tokens. Its share of the squared error is 77 % there and 14 % at most
elsewhere, but beside its own size it has the least error of all rows there (45 dB).
"""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_lowbit.codecs import wire
from megatron_lowbit.codecs.base import Codec
from megatron_lowbit.codecs.experiments import lattice, pairs, trellis
from megatron_lowbit.codecs.shaped_hybrid import ShapedHybrid
from megatron_lowbit.codecs.tables import Tables

# The step of the best uniform quantizer of a unit Gaussian, by bits.
_STEPS = {4: 0.3352, 3: 0.5860, 2: 0.9957, 5: 0.1881, 6: 0.1041}


class TryCentred(ShapedHybrid):
    """Only the centring of `shaped-hybrid`, without its weights.

    Might win: a feature that calibration saw otherwise than it is spoils nothing. 20.22 / 14.62 /
    9.30 dB, as all that change only what is rotated. Not kept: it is half of `shaped-hybrid`.
    """

    name = "try-centred"

    def tables(self, hidden, *, statistics=None, **settings):
        if statistics is not None and statistics.variance is not None:
            statistics = replace(statistics, variance=torch.ones_like(statistics.variance))
        return super().tables(hidden, statistics=statistics, **settings)


class TryEvened(ShapedHybrid):
    """Only the weights of `shaped-hybrid`, without the centring.

    Might win: it needs no table of each rank. 20.22 / 14.62 / 9.30 dB. Not kept: it is the other
    half.
    """

    name = "try-evened"

    def tables(self, hidden, *, statistics=None, **settings):
        if statistics is not None:
            statistics = replace(statistics, mean=None)
        return super().tables(hidden, statistics=statistics, **settings)


class TryUnrotated(ShapedHybrid):
    """`shaped-hybrid` without the rotation.

    Might win: cheaper. 20.22 / 14.62 / 9.30 dB on a Gaussian, which needs no rotation. Not kept:
    features that stay apart have other sizes and heavier tails than the codebook is made for
    (`scaled-hybrid` corrects the sizes).
    """

    name = "try-unrotated"

    def __init__(self, bits: int | None = None, *, sum_bits: int | None = None):
        super().__init__(bits, sum_bits=sum_bits, rotate=False)


class _OtherCodes(ShapedHybrid):
    """`shaped-hybrid` with other codes, which the kernels do not know."""

    @property
    def takes_symmetric_memory(self) -> bool:
        return False

    def kernels(self, values: Tensor, tables: Tables, **_) -> None:
        return None


class TryUniform(_OtherCodes):
    """Equal steps instead of Lloyd-Max levels, with the step that is best for a Gaussian.

    Might win: no table of levels. 19.38 / 14.27 / 9.25 dB. Not kept: a table costs nothing.
    """

    name = "try-uniform"

    def _pack(self, values: Tensor) -> Tensor:
        return wire.pack(_to_grid(values / _STEPS[self.bits], self.bits), self.bits)

    def _unpack(self, packed: Tensor, hidden: int) -> Tensor:
        codes = wire.unpack(packed, self.bits, hidden)
        return _from_grid(codes, self.bits) * _STEPS[self.bits]


class TryCompanded(_OtherCodes):
    """Equal steps of a mu-law: sign(x) log(1 + mu |x| / reach) / log(1 + mu).

    Might win: steps that grow outwards without a table. 20.05 / 14.56 / 9.29 dB with mu and reach
    tuned for a Gaussian. Not kept: between uniform and Lloyd-Max, and a table costs nothing.
    """

    name = "try-companded"
    _SHAPES = {4: (2.0, 2.977), 3: (1.0, 2.551), 2: (0.5, 2.125), 5: (3.0, 3.333), 6: (3.0, 3.620)}

    def _pack(self, values: Tensor) -> Tensor:
        mu, reach = torch.tensor(self._SHAPES[self.bits])
        bent = values.sign() * (values.abs() * (mu / reach)).log1p() / mu.log1p()
        return wire.pack(_to_grid(bent * 2 ** (self.bits - 1), self.bits), self.bits)

    def _unpack(self, packed: Tensor, hidden: int) -> Tensor:
        mu, reach = torch.tensor(self._SHAPES[self.bits])
        bent = _from_grid(wire.unpack(packed, self.bits, hidden), self.bits) / 2 ** (self.bits - 1)
        return bent.sign() * (bent.abs() * mu.log1p()).expm1() * (reach / mu)


class TryDither(_OtherCodes):
    """Equal steps with subtractive dither: an offset known to both sides, of each rotated value.

    Might win: the error does not depend on the value, so that it adds up over ranks and tokens as
    noise does. The offset can only depend on the place in the row, since a codec does not know
    which token it sees. 19.34 / 14.14 / 8.90 dB. Not kept: a Gaussian of 3 and more steps has such
    an error without dither, which costs range.
    """

    name = "try-dither"
    _DITHERED_STEPS = {4: 0.3363, 3: 0.5912, 2: 1.0121}
    supported_bits = tuple(_DITHERED_STEPS)

    def _pack(self, values: Tensor) -> Tensor:
        scaled = values / self._DITHERED_STEPS[self.bits] + _dither(values.shape[1], values.device)
        return wire.pack(_to_grid(scaled, self.bits), self.bits)

    def _unpack(self, packed: Tensor, hidden: int) -> Tensor:
        values = _from_grid(wire.unpack(packed, self.bits, hidden), self.bits)
        return (values - _dither(hidden, packed.device)) * self._DITHERED_STEPS[self.bits]


class TryVector(_OtherCodes):
    """Pairs of rotated values in a codebook of 4**bits points (`codecs.experiments.pairs`).

    Might win: cells closer to circles, and none wasted on pairs that are both large. 21.08 / 15.26
    / 9.68 dB. Not kept so far: a kernel looks up a table of cells of 1 MB and more, or searches.
    """

    name = "try-vector"
    supported_bits = (4, 3, 2)

    def _pack(self, values: Tensor) -> Tensor:
        tokens, hidden = values.shape
        values = torch.nn.functional.pad(values, (0, hidden % 2)).view(tokens, -(-hidden // 2), 2)
        return wire.pack(pairs.quantize(values, self.bits), 2 * self.bits)

    def _unpack(self, packed: Tensor, hidden: int) -> Tensor:
        codes = wire.unpack(packed, 2 * self.bits, -(-hidden // 2))
        return pairs.dequantize(codes, self.bits).flatten(1)[:, :hidden]


class TryLattice(_OtherCodes):
    """Eight rotated values at a time to the lattice E8 (`codecs.experiments.lattice`).

    Might win: rounder cells than `try-uniform`, without a codebook. 20.03 / 14.95 / 9.90 dB: ahead
    of Lloyd-Max at 2 and 3 bits. Not kept: a box of equal cells does not follow a Gaussian, which
    at 4 bits costs what the cells win, and `try-trellis` is ahead at all bits.
    """

    name = "try-lattice"
    _LATTICE_STEPS = {4: 0.3352, 3: 0.5860, 2: 0.9857, 5: 0.1881, 6: 0.1061}
    supported_bits = tuple(_LATTICE_STEPS)

    def _body_bytes(self, hidden: int) -> int:
        return wire.packed_bytes(8 * -(-hidden // 8), self.bits)

    def _pack(self, values: Tensor) -> Tensor:
        tokens, hidden = values.shape
        values = torch.nn.functional.pad(values, (0, -hidden % 8)).view(tokens, -(-hidden // 8), 8)
        codes = lattice.quantize(values / self._LATTICE_STEPS[self.bits], self.bits)
        return wire.pack(codes.flatten(1), self.bits)

    def _unpack(self, packed: Tensor, hidden: int) -> Tensor:
        groups = -(-hidden // 8)
        codes = wire.unpack(packed, self.bits, 8 * groups).view(len(packed), groups, 8)
        values = lattice.dequantize(codes, self.bits) * self._LATTICE_STEPS[self.bits]
        return values.flatten(1)[:, :hidden]


class TryTrellis(_OtherCodes):
    """Trellis-coded rotated values (`codecs.experiments.trellis`).

    Might win: 21.99 / 16.29 / 10.67 dB, of all codes here the closest to the bound. Reading is as
    cheap as with any table. Not kept so far: writing is a search through a row, value by value,
    with eight states.
    """

    name = "try-trellis"
    supported_bits = (4, 3, 2)

    def _pack(self, values: Tensor) -> Tensor:
        return wire.pack(trellis.quantize(values, self.bits), self.bits)

    def _unpack(self, packed: Tensor, hidden: int) -> Tensor:
        return trellis.dequantize(wire.unpack(packed, self.bits, hidden), self.bits)


def _to_grid(values: Tensor, bits: int) -> Tensor:
    """Codes of ``2**bits`` equal steps of 1 around zero."""
    half = 1 << (bits - 1)
    return (values.floor() + half).int().clamp(0, 2 * half - 1)


def _from_grid(codes: Tensor, bits: int) -> Tensor:
    """The middles of those steps, fp32."""
    return codes - (2 ** (bits - 1) - 0.5)


def _dither(hidden: int, device: torch.device) -> Tensor:
    """fp32 ``[hidden]``, evenly spread over a step: multiples of the golden ratio modulo 1."""
    place = torch.arange(hidden, dtype=torch.float64, device=device)
    return (place * 0.6180339887498949 % 1 - 0.5).float()


_TRIED = (
    *(TryCentred, TryEvened, TryUnrotated, TryUniform, TryCompanded, TryDither),
    *(TryVector, TryLattice, TryTrellis),
)
CANDIDATES: dict[str, type[Codec]] = {codec.name: codec for codec in _TRIED}
