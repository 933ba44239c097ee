"""The policy: by which collective a message goes, the same on every rank.

A fixed mode takes one collective for every message, so that a token's result never depends on the
batch that it is in. `auto` takes low bits only where they surely save time: by times of this very
group (`comm.policy.timings`), which are taken when the model is loaded (`comm.policy.measurement`)
or come from a tuning file (`comm.policy.tuning`). Times come to all ranks with the same bits, and a
message has the same size on all ranks, so all choose alike. All sync points of a pass have messages
of one size, so a pass goes by one collective. What was chosen stays until `retune`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_lowbit._moved import renamed
from megatron_lowbit.comm.hierarchical import Nodes
from megatron_lowbit.comm.policy.timings import (
    BF16_BYTES,
    NATIVE,
    NATIVE_SCATTER,
    ByTimes,
    size_text,
)
from megatron_lowbit.comm.symmetric_memory import NOT_OPENED, SymmetricMemory
from megatron_lowbit.comm.traffic import Decision
from megatron_lowbit.errors import LowbitError

MODES = ("auto", "native", "one-shot", "two-shot", "hierarchical")
DEFAULT_MODE = "auto"

Measure = Callable[[], ByTimes]


@dataclass(frozen=True)
class Settings:
    """What the user says about collectives.

    Attributes:
        mode: One of `MODES`.
        tuning: A tuning file for `auto`; times taken at load without one.
        node_size: Ranks of the group in a node; from torchrun's local world size if None.
        low_bit_inside: Hierarchical sends low bits inside a node, too, instead of BF16.

    Raises:
        LowbitError: An unknown mode, or a setting that means nothing to it.
    """

    mode: str = DEFAULT_MODE
    tuning: Path | None = None
    node_size: int | None = None
    low_bit_inside: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise LowbitError(f"unknown collective {self.mode!r}: choose one of {', '.join(MODES)}")
        if self.tuning is not None and self.mode != "auto":
            raise LowbitError(f"a tuning file means nothing to {self.mode}: choose auto")
        two_level = self.node_size is not None or self.low_bit_inside
        if two_level and self.mode not in ("auto", "hierarchical"):
            raise LowbitError(f"nodes mean nothing to {self.mode}: choose hierarchical or auto")


class Policy:
    """Chooses a collective for each message of one group.

    Attributes:
        mode: One of `MODES`.
        nodes: The two levels of the group, where hierarchical is possible.
        times: What `auto` goes by; None in a fixed mode.
        symmetric_memory: The memory that short messages go through, or why there is none.
    """

    def __init__(
        self,
        mode: str,
        *,
        nodes: Nodes | None = None,
        times: ByTimes | None = None,
        measure: Measure | None = None,
        symmetric_memory: SymmetricMemory = NOT_OPENED,
    ):
        self.mode, self.nodes, self.times = mode, nodes, times
        self.symmetric_memory = symmetric_memory
        self._measure = measure
        self._known: dict[tuple[str, int], Decision] = {}

    def all_reduce(self, values: int) -> Decision:
        """The collective for an all-reduce of so many values."""
        if self.mode != "auto":
            return Decision(self.mode, "fixed")
        return self._decided(NATIVE, values)

    def reduce_scatter(self, values: int) -> Decision:
        """Low bits or native for a reduce-scatter of so many values."""
        if self.mode == "auto":
            return self._decided(NATIVE_SCATTER, values)
        low = NATIVE_SCATTER if self.mode == "native" else "reduce-scatter"
        return Decision(low, "fixed")

    def retune(self) -> None:
        """Take the times of this group again; call it on every rank alike, between two passes.

        Raises:
            LowbitError: The mode is fixed.
        """
        if self._measure is None:
            raise LowbitError(f"{self.mode} is fixed: only auto has times that can be taken again")
        self.times = self._measure()
        self._known.clear()

    def spans(self) -> str:
        """From which message size `auto` takes which collective, in words."""
        assert self.times is not None, "auto is made with times"
        text = f"by {self.times.how}: {_spans(self.all_reduce)}"
        if self.times.timings.sizes(NATIVE_SCATTER):
            text += f"; scatters: {_spans(self.reduce_scatter)}"
        return text

    def _decided(self, native: str, values: int) -> Decision:
        key = (native, values)
        if key not in self._known:
            assert self.times is not None, "auto is made with times"
            self._known[key] = self.times.decide(native, BF16_BYTES * values)
        return self._known[key]


def _spans(decide: Callable[[int], Decision]) -> str:
    """``native, one-shot from 32 KB``."""
    parts, last = [], None
    for exponent in range(12, 28):
        name = decide((1 << exponent) // BF16_BYTES).collective
        if name != last:
            parts.append(name if last is None else f"{name} from {size_text(1 << exponent)}")
        last = name
    return ", ".join(parts)


__getattr__ = renamed(__name__)
