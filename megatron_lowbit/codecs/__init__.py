"""Codecs by name: the plain-torch reference of each, which is its specification.

A new codec is one module with a `Codec` subclass and one entry in `CODECS`; collectives,
calibration, integration and evaluation take it from there.
"""

from megatron_lowbit.codecs.base import Codec, Tables
from megatron_lowbit.codecs.bf16 import Bf16
from megatron_lowbit.codecs.rotated_hybrid import RotatedHybrid
from megatron_lowbit.codecs.static_hybrid import StaticHybrid
from megatron_lowbit.errors import LowbitError

CODECS: dict[str, type[Codec]] = {
    codec.name: codec for codec in (Bf16, StaticHybrid, RotatedHybrid)
}
DEFAULT_CODEC = RotatedHybrid.name


def get_codec(name: str = DEFAULT_CODEC, *, bits: int | None = None) -> Codec:
    """A codec by its name.

    Args:
        name: One of `CODECS`.
        bits: Bits of a body value; the codec's default if left out.

    Raises:
        LowbitError: No such codec, or it has no version of that many bits.
    """
    if name not in CODECS:
        raise LowbitError(f"unknown codec {name!r}: choose one of {', '.join(CODECS)}")
    kind = CODECS[name]
    if bits is None:
        return kind()
    if bits not in kind.supported_bits:
        supported = ", ".join(map(str, kind.supported_bits))
        raise LowbitError(f"codec {name} has no {bits}-bit version: choose from {supported}")
    return kind(bits)


__all__ = ["CODECS", "DEFAULT_CODEC", "Codec", "Tables", "get_codec"]
