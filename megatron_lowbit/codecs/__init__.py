"""Codecs by name: the plain-torch reference of each, which is its specification.

A new codec is one module with a `Codec` subclass and one entry in `_OWN`; collectives,
calibration, integration and evaluation take it from there. Other packages bring codecs of their own
by an entry point (`codecs.foreign`).
"""

import re

from megatron_lowbit.codecs.base import Codec
from megatron_lowbit.codecs.bf16 import Bf16
from megatron_lowbit.codecs.experiments.candidates import CANDIDATES
from megatron_lowbit.codecs.foreign import loading
from megatron_lowbit.codecs.foreign.contract import check_codec
from megatron_lowbit.codecs.peers.asymmetric_groups import (
    Int4Group32Asymmetric,
    Int4Group128Asymmetric,
    SpikeGroup32,
)
from megatron_lowbit.codecs.peers.fp4 import Mxfp4, Nvfp4
from megatron_lowbit.codecs.peers.sdp4bit import Sdp4Bit, Sdp4BitPlain
from megatron_lowbit.codecs.peers.symmetric_groups import (
    Fp8Group256,
    Int4Group16,
    Int4Group32,
    Int8Group32,
    Int8Token,
)
from megatron_lowbit.codecs.rotated_hybrid import RotatedHybrid
from megatron_lowbit.codecs.scaled_hybrid import ScaledHybrid
from megatron_lowbit.codecs.shaped_hybrid import ShapedHybrid
from megatron_lowbit.codecs.static_hybrid import StaticHybrid
from megatron_lowbit.codecs.tables import Statistics, Tables
from megatron_lowbit.errors import LowbitError

_OWN = (Bf16, StaticHybrid, ScaledHybrid, RotatedHybrid, ShapedHybrid)
_PEERS = (
    *(Int4Group32, Int4Group16, Int4Group32Asymmetric, Int4Group128Asymmetric, SpikeGroup32),
    *(Mxfp4, Nvfp4, Fp8Group256, Int8Token, Int8Group32, Sdp4Bit, Sdp4BitPlain),
)
CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (*_OWN, *_PEERS)}
DEFAULT_CODEC = RotatedHybrid.name  # needs no calibration
CALIBRATED_CODEC = ShapedHybrid.name  # the best that there is with one


def get_codec(name: str = DEFAULT_CODEC, *, bits: int | tuple[int, int] | None = None) -> Codec:
    """A codec by its name.

    Args:
        name: One of `CODECS`, or one that an installed package declares.
        bits: Bits of a body value, or a pair: of the partials, and of the sum in the collectives
            that send it (two-shot, hierarchical). The codec's default if left out.

    Raises:
        LowbitError: No such codec, or it has no version of that many bits; another package's
            cannot be imported, or breaks the contract.
    """
    return _make(CODECS, name, bits)


def codec_names() -> list[str]:
    """Of all that `get_codec` knows: `CODECS`, and other packages', which are not loaded."""
    return [*CODECS, *loading.declared()]


def parse_codec(text: str) -> Codec:
    """A codec by its name in results: ``rotated-hybrid``, ``rotated-hybrid-3`` or ``...-4+6``.

    Unlike `get_codec` it knows the `CANDIDATES`, too: they can be measured, not served with.
    """
    known = CODECS | CANDIDATES
    match = re.fullmatch(r"(.+)-(\d+)(?:\+(\d+))?", text)
    if text in known or text in loading.declared() or match is None:
        return _make(known, text, None)
    name, first, second = match.groups()
    return _make(known, name, (int(first), int(second)) if second else int(first))


def _make(known: dict[str, type[Codec]], name: str, bits: int | tuple[int, int] | None) -> Codec:
    first, second = bits if isinstance(bits, tuple) else (bits, None)
    if name in known:
        loading.refuse_claimed(name)
        return known[name](first, sum_bits=second)
    if name in loading.declared():
        return loading.make(name, first, second, ours=(*CODECS, *CANDIDATES))
    raise LowbitError(
        f"unknown codec {name!r}: choose one of {', '.join(codec_names())}; or install the package "
        "that has it"
    )


__all__ = [
    "CALIBRATED_CODEC",
    "CANDIDATES",
    "CODECS",
    "DEFAULT_CODEC",
    "Codec",
    "Statistics",
    "Tables",
    "check_codec",
    "codec_names",
    "get_codec",
    "parse_codec",
]
