"""Codecs of other packages, found by their name.

A package declares them as entry points of the group ``megatron_lowbit.codecs``:

    entry_points={"megatron_lowbit.codecs": ["acme-int6 = acme.codecs:Int6Token"]}

Names are read from the metadata of what is installed. A package's code is imported when one of its
codecs is asked for by name, and never before. So this runs code that was installed on this machine,
and never code of a model or of a calibration index: those can only say the name.
"""

import re
from collections.abc import Collection
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from megatron_lowbit.codecs.base import Codec
from megatron_lowbit.codecs.foreign.contract import check_codec
from megatron_lowbit.errors import LowbitError

GROUP = "megatron_lowbit.codecs"
# Words that mean something else where a codec's name stands: in recipes and in evaluations.
_TAKEN = ("native", "recipe", "int4", "int4-random")
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@cache
def declared() -> dict[str, tuple[EntryPoint, ...]]:
    """Each name with all that declare it; nothing of them is imported."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, _package(entry))):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def refuse_claimed(name: str) -> None:
    """Raise LowbitError if another package declares `name`, which is ours."""
    if name in declared():
        package = _package(declared()[name][0])
        raise LowbitError(
            f"codec {name!r} is ours, and the package {package} declares one of that name: which "
            "is meant is not clear, so have it renamed there, or uninstall that package"
        )


def make(name: str, bits: int | None, sum_bits: int | None, ours: Collection[str]) -> Codec:
    """A codec of another package.

    Args:
        name: One of `declared`.
        bits: Of a body value; the codec's default if None.
        sum_bits: Of a body value of the sum; as `bits` if None.
        ours: Names that it cannot have.

    Raises:
        LowbitError: Its name is not its own, it cannot be imported, it has no version of so many
            bits, or it breaks the contract; one line that names it and its package.
    """
    kind = _load(name, tuple(ours))
    where = _described(declared()[name][0])
    try:
        codec = kind(bits, sum_bits=sum_bits)
    except LowbitError:
        raise
    except Exception as error:
        raise LowbitError(
            f"{where} cannot be made with (bits, sum_bits=...), as Codec is: {_line(error)}"
        ) from error
    _check_once(kind, codec.bits, codec.sum_bits)
    return codec


@cache
def _load(name: str, ours: tuple[str, ...]) -> type[Codec]:
    """The class; see `make`."""
    entry, *others = declared()[name]
    if others:
        packages = " and ".join(_package(each) for each in (entry, *others))
        raise LowbitError(f"codec {name!r} is declared by {packages}: uninstall all but one")
    if name in (*ours, *_TAKEN) or not _NAME.fullmatch(name):
        raise LowbitError(
            f"{_described(entry)} cannot have this name: it is small letters and digits with "
            f"hyphens between, and none of {', '.join(_TAKEN)}"
        )
    try:
        kind = entry.load()
    except (Exception, SystemExit) as error:
        raise LowbitError(f"{_described(entry)} cannot be imported: {_line(error)}") from error
    if not (isinstance(kind, type) and issubclass(kind, Codec)):
        raise LowbitError(f"{_described(entry)} is no class derived from codecs.Codec: {kind!r}")
    if getattr(kind, "name", None) != name:
        raise LowbitError(
            f"{_described(entry)} calls itself {getattr(kind, 'name', None)!r}: its name and the "
            "entry point's must be the same"
        )
    return kind


@cache
def _check_once(kind: type[Codec], bits: int, sum_bits: int) -> None:
    """The quick checks, once for each class and number of bits."""
    check_codec(kind(bits, sum_bits=sum_bits), quick=True)


def _described(entry: EntryPoint) -> str:
    return f"codec {entry.name!r} of the package {_package(entry)} ({entry.value})"


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "of an unknown package"


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
