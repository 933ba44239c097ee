"""What a sweep is to measure: sizes, codecs, collectives, ranks and the link between them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_lowbit.benchmark.collectives.links import parse_rate
from megatron_lowbit.benchmark.collectives.ranks import MOST_RANKS
from megatron_lowbit.codecs import CALIBRATED_CODEC, DEFAULT_CODEC, parse_codec
from megatron_lowbit.comm.policy.timings import BF16_BYTES
from megatron_lowbit.errors import LowbitError

DEFAULT_SIZES = "8K,32K,128K,512K,2M,8M,64M"
# Below it a message is mostly rounding: half a dozen features a token.
LEAST_SIZE = 1 << 10
MOST_SIZE = 1 << 32
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

TUNED = (DEFAULT_CODEC, CALIBRATED_CODEC)
COLLECTIVES = ("one-shot", "two-shot", "hierarchical", "auto", "reduce-scatter")
SCATTERS = ("reduce-scatter", "native reduce-scatter")


def parse_sizes(text: str) -> tuple[int, ...]:
    """Sizes such as ``8K,2M``, ascending, each once."""
    sizes = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)([KMG]?)B?", part.strip().upper())
        if match is None:
            raise LowbitError(f"{part!r} is no message size: write it like 8K or 2M")
        sizes.add(int(match[1]) * _UNITS[match[2]])
    return tuple(sorted(sizes))


@dataclass(frozen=True)
class Variant:
    """One way to send a message.

    Attributes:
        codec: ``native bf16``, ``native fp32``, or a codec as `parse_codec` reads it.
        collective: ``native``, ``native reduce-scatter`` or one of `COLLECTIVES`.
    """

    codec: str
    collective: str

    @property
    def is_native(self) -> bool:
        return self.codec.startswith("native")

    @property
    def label(self) -> tuple[str, str]:
        """Codec and collective as in the results."""
        return self.codec if self.is_native else repr(parse_codec(self.codec)), self.collective

    @property
    def rival(self) -> "Variant":
        """What its speedup is measured against."""
        return NATIVE_SCATTER if self.collective in SCATTERS else NATIVE


NATIVE = Variant("native bf16", "native")
CONTROL = Variant("native bf16, again", "native")  # what native differs by from itself
NATIVE_FP32 = Variant("native fp32", "native")
NATIVE_SCATTER = Variant("native bf16", "native reduce-scatter")
# Our codec in its forms, the paper's method, and the peers as they send: QuickReduce, FlashInfer,
# SGLang.
DEFAULT_VARIANTS = (
    NATIVE_FP32,
    Variant(DEFAULT_CODEC, "one-shot"),
    Variant(DEFAULT_CODEC, "two-shot"),
    Variant(f"{DEFAULT_CODEC}-4+6", "two-shot"),
    Variant("static-hybrid", "one-shot"),
    Variant("int4-g32", "two-shot"),
    Variant("fp8-g256", "two-shot"),
    Variant("int8-token", "one-shot"),
    Variant(DEFAULT_CODEC, "hierarchical"),
    Variant(DEFAULT_CODEC, "auto"),
)


@dataclass(frozen=True)
class Plan:
    """One sweep at one number of ranks.

    Attributes:
        variants: What to measure beside native BF16, which always is; hierarchical is left out
            without `node_size`.
        sizes: Bytes of the message in BF16.
        ranks: Processes to start; None: this is one of those that torchrun started.
        link: Rate between them, as in ``1gbit``; None: loopback.
        hidden: Features in a token, fewer where a message is smaller than the tokens it needs.
        node_size: Ranks in a node of hierarchical.
        tuning: A tuning file for `auto`; times taken before without one.
        write_tuning: Where a tuning file of `tuned` goes, by times that are taken after the sweep.
        tuned: Codecs, as `parse_codec` reads them.
        feedback: Whether low-bit calls carry errors, each to the next (`comm.feedback`).
        seconds: Of timed calls for each size and variant, at the least seven calls.
        in_passes: Whether calls are made and timed as in a model (`timing.time_passes`).

    Raises:
        LowbitError: A value that cannot be measured; the message names it.
    """

    variants: tuple[Variant, ...] = DEFAULT_VARIANTS
    sizes: tuple[int, ...] = parse_sizes(DEFAULT_SIZES)
    ranks: int | None = 2
    link: str | None = None
    hidden: int = 4096
    node_size: int | None = None
    tuning: Path | None = None
    write_tuning: Path | None = None
    tuned: tuple[str, ...] = TUNED
    feedback: bool = False
    seconds: float = 1.0
    in_passes: bool = False

    def __post_init__(self):
        if self.ranks is not None and not 2 <= self.ranks <= MOST_RANKS:
            raise LowbitError(f"{self.ranks} is no number of ranks: take 2 to {MOST_RANKS}")
        if self.link is not None:
            parse_rate(self.link)
            if self.ranks is None:
                raise LowbitError(f"link {self.link} means nothing to ranks that torchrun started")
        for size in self.sizes:
            if not LEAST_SIZE <= size <= MOST_SIZE:
                raise LowbitError(f"{size} bytes is no message size: take 1K to 4G")
        if self.hidden < 1:
            raise LowbitError(f"{self.hidden} is no hidden size: take 1 or more")
        if not self.seconds > 0:
            raise LowbitError(f"{self.seconds} is no time to measure: take more than 0 seconds")
        for variant in self.variants:
            _check(variant)
        for codec in self.tuned:
            parse_codec(codec)
        if self.node_size is not None and self.ranks is not None:
            check_node_size(self.node_size, self.ranks)

    @property
    def measured(self) -> tuple[Variant, ...]:
        """All variants: native first, each once."""
        chosen = [v for v in self.variants if self.node_size or v.collective != "hierarchical"]
        return tuple(dict.fromkeys([NATIVE, *(v.rival for v in chosen), *chosen]))

    @property
    def where(self) -> str:
        """The link in the words of the results."""
        return "as it is" if self.ranks is None else self.link or "loopback"


def check_node_size(size: int, ranks: int) -> None:
    """Raise unless `ranks` are several nodes of `size`."""
    if size < 1 or ranks % size or ranks == size:
        raise LowbitError(f"{ranks} ranks are not several nodes of {size}")


def shape_of(size: int, *, hidden: int, multiple: int = 1) -> tuple[int, int]:
    """Tokens and features of a message of `size` bytes of BF16, rounded down to whole tokens.

    A message too small for `multiple` tokens of `hidden` features has so many tokens of fewer.
    """
    values = size // BF16_BYTES
    if values < multiple * hidden:
        return multiple, values // multiple
    return values // hidden // multiple * multiple, hidden


def choose_variants(
    *,
    codecs: Iterable[str] | None = None,
    collectives: Iterable[str] | None = None,
) -> tuple[Variant, ...]:
    """The variants of a command line.

    Args:
        codecs: Every one by every collective; the default variants if left out.
        collectives: Those of the default variants that go by them, and the default codec by
            those that none of these goes by; with `codecs` one-shot, two-shot, hierarchical and
            auto if left out.

    Raises:
        LowbitError: An unknown codec or collective.
    """
    asked = list(collectives or ())
    for name in asked:
        if name not in COLLECTIVES:
            raise LowbitError(
                f"unknown collective {name!r}: choose from {', '.join(COLLECTIVES)} (native is "
                "always measured)"
            )
    if codecs is not None:
        chosen = [Variant(c, by) for c in codecs for by in asked or COLLECTIVES[:-1]]
    elif asked:
        chosen = [v for v in DEFAULT_VARIANTS if v.collective in asked]
        missing = [by for by in asked if all(v.collective != by for v in chosen)]
        chosen += [Variant(DEFAULT_CODEC, by) for by in missing]
    else:
        chosen = list(DEFAULT_VARIANTS)
    return tuple(dict.fromkeys(chosen))


def _check(variant: Variant) -> None:
    if variant.is_native:
        if variant not in (NATIVE, CONTROL, NATIVE_FP32, NATIVE_SCATTER):
            raise LowbitError(f"{variant.codec} cannot be measured by {variant.collective}")
        return
    parse_codec(variant.codec)
    if variant.collective not in COLLECTIVES:
        raise LowbitError(
            f"unknown collective {variant.collective!r}: choose from {', '.join(COLLECTIVES)}"
        )
