"""Accounting: what went through a sync point, by which collective, why, and how long it took."""

import time
from dataclasses import dataclass, field, replace

import torch

from megatron_lowbit._moved import renamed


@dataclass(frozen=True)
class Decision:
    """Which collective a message goes by, and why.

    Attributes:
        collective: Of an all-reduce ``native``, ``one-shot``, ``two-shot`` or ``hierarchical``;
            otherwise ``reduce-scatter``, ``native reduce-scatter`` or ``all-gather``; ``skip``
            where 0 bits are sent.
        why: ``fixed``, or what `auto` went by; for calls that a CUDA graph captured, whose replays
            no one counts, it says so.
    """

    collective: str
    why: str


@dataclass
class Counters:
    """Calls of one kind added up.

    Attributes:
        calls: Collectives.
        tokens: Tokens reduced.
        values: Values reduced (tokens x hidden).
        payload_bytes: Bytes of this rank's message in the form it travels in: of its payload, or
            the mean of both steps' payloads where a sum is sent, too.
        sent_bytes: Bytes that this rank sent to others; for native, those of a ring.
        seconds: From the call to its end: on a CPU wall time, on a GPU time on the stream.
    """

    calls: int = 0
    tokens: int = 0
    values: int = 0
    payload_bytes: int = 0
    sent_bytes: int = 0
    seconds: float = 0.0

    @property
    def bits_per_value(self) -> float:
        """Payload bits per value; NaN before the first call."""
        return 8 * self.payload_bytes / self.values if self.values else float("nan")

    def add(self, other: "Counters") -> None:
        """Add another's counts to these."""
        self.calls += other.calls
        self.tokens += other.tokens
        self.values += other.values
        self.payload_bytes += other.payload_bytes
        self.sent_bytes += other.sent_bytes
        self.seconds += other.seconds


@dataclass
class Traffic:
    """What went through a sync point, by decision: real sizes, added up call by call."""

    _by_decision: dict[Decision, Counters] = field(default_factory=dict)
    _open: list = field(default_factory=list, repr=False, compare=False)

    def add(self, decision: Decision, counters: Counters, clock: "Clock") -> None:
        """Count one call."""
        if clock.is_captured:
            decision = replace(
                decision, why=f"{decision.why}, in a CUDA graph: replays are not counted"
            )
        entry = self._by_decision.get(decision)
        if entry is None:
            entry = self._by_decision[decision] = Counters()
        entry.add(counters)
        if not clock.has_events:  # in a capture, which asking an event would end, it has none
            entry.seconds += clock.seconds()
            return
        # A GPU's clocks are read once their events have passed; nothing waits for them here.
        self._open.append((entry, clock))
        while self._open and self._open[0][1].passed():
            done, clock = self._open.pop(0)
            done.seconds += clock.seconds()

    @property
    def by_decision(self) -> dict[Decision, Counters]:
        """The counters; on a GPU this waits for the calls that are under way."""
        for entry, clock in self._open:
            entry.seconds += clock.seconds()
        self._open.clear()
        return self._by_decision

    def total(self) -> Counters:
        """All calls together."""
        total = Counters()
        for counters in self.by_decision.values():
            total.add(counters)
        return total


class Clock:
    """Times one call: wall time on a CPU, events on a GPU's stream unless a graph captures it."""

    def __init__(self, device: torch.device):
        self._events = None
        self._on_gpu = device.type == "cuda"
        self.is_captured = self._on_gpu and torch.cuda.is_current_stream_capturing()
        if self._on_gpu and not self.is_captured:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._start, self._stop = time.perf_counter(), 0.0

    def stop(self) -> "Clock":
        """The call has ended (on a GPU: has been put on the stream)."""
        self._stop = time.perf_counter()
        if self._events:
            self._events[1].record()
        return self

    @property
    def has_events(self) -> bool:
        """Whether `seconds` is known on the GPU first."""
        return self._events is not None

    def passed(self) -> bool:
        """Whether `seconds` would not wait for the events."""
        assert self._events is not None, "see has_events"
        return self._events[1].query()

    def seconds(self) -> float:
        """How long the call took; 0 for one captured in a CUDA graph, which nothing times."""
        if self._events:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return 0.0 if self._on_gpu else self._stop - self._start


__getattr__ = renamed(__name__)
