"""Error feedback over a chain of sums: each sends what the one before it did not.

A *chain* is a list of sync points whose sums are added to the same residual stream, one after the
other, for the same tokens. `codecs.carry` has the arithmetic; here is where carries are kept
between two sync points, and when one may be taken:

- The first sync point of a chain never takes. So it starts a *pass*, whatever ended the last one.
- A later one takes what its predecessor gave in this pass for the same shape and dtype. Anything
  else is dropped and counted; if the predecessor sent nothing at all (0 bits), it is an error.
- The last one gives to nobody.

Whether a sync point takes depends on its place, shape and dtype alone, since no Python runs when a
CUDA graph is replayed. Buffers lie at fixed addresses and rotate by place in the chain: a graph
manager runs a layer of two sync points several times before it captures it, and a run must not read
the carry that it has written itself. So there are three (a layer's sync points and one). They grow
to the longest pass, never with the number of passes; those that a capture has used are kept.

Two-shot and hierarchical quantize sums again. The owner of a token carries that error in the fp32
sum, so that a token's result does not depend on which rank owns it. Where the next collective sends
no sum, two-shot's goes into the owner's partial. Between hierarchical and any other collective the
carries of sums are dropped, and counted.
"""

from collections.abc import Container, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_lowbit.codecs.carry import Carry
from megatron_lowbit.errors import LowbitError

SLOTS = 3


class _Key(NamedTuple):
    """What a carry belongs to: it is taken under the same key only."""

    number: int  # of the pass
    shape: torch.Size
    dtype: torch.dtype


class Carries:
    """One kind of carry along a chain: BF16 rows in buffers that are used in turn."""

    def __init__(self, slots: int):
        self._buffers: list[Tensor | None] = [None] * slots
        self._pinned: dict[int, list[Tensor | None]] = {}  # by values: what graphs write to
        self._keys: dict[int, _Key] = {}  # by place: what was given there last

    def take(self, place: int, key: _Key, rows: int, hidden: int) -> Tensor | None:
        """BF16 ``[rows, hidden]``: what the place before gave under `key`, if it did."""
        if self._keys.get(place - 1) != key:
            return None
        buffers = self._pinned.get(rows * hidden, self._buffers)
        buffer = buffers[(place - 1) % len(buffers)]
        assert buffer is not None, "a key was noted without a buffer"
        return buffer[: rows * hidden].view(rows, hidden)

    def give(self, place: int, key: _Key, rows: int, hidden: int, device: torch.device) -> Tensor:
        """BF16 ``[rows, hidden]``: where the place puts its carry."""
        values = rows * hidden
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._pinned.setdefault(values, list(self._buffers))
        buffers = self._pinned.get(values, self._buffers)
        slot = place % len(buffers)
        buffer = buffers[slot]
        if buffer is None or len(buffer) < values or buffer.device != device:
            # One made in inference mode could not be written outside it.
            with torch.inference_mode(False):
                buffer = buffers[slot] = torch.empty(values, dtype=torch.bfloat16, device=device)
        self._keys[place] = key
        return buffer[:values].view(rows, hidden)

    def gave_in(self, place: int, number: int) -> bool:
        """Whether `place` gave a carry in the pass `number`, under any shape."""
        found = self._keys.get(place)
        return found is not None and found.number == number

    def forget(self, place: int) -> None:
        """`place` has given nothing."""
        self._keys.pop(place, None)

    def bytes(self) -> int:
        """Of all buffers."""
        sets = [self._buffers, *self._pinned.values()]
        found = {id(b): b for buffers in sets for b in buffers if b is not None}
        return sum(b.numel() * b.element_size() for b in found.values())


class Chain:
    """The carries of one chain on this rank.

    Attributes:
        dropped: How many carries were lost: their shape or pass was another, or they were of sums
            that the next collective does not make.
    """

    def __init__(self, slots: int = SLOTS):
        self._slots = slots
        self._partials = Carries(slots)
        self._sums: dict[str, Carries] = {}
        self._pass = 0
        self._bounded: Tensor | None = None
        self.dropped = 0

    @property
    def bounded(self) -> int:
        """How many rows' carries were scaled down; on a GPU this waits for the device."""
        return 0 if self._bounded is None else int(self._bounded.item())

    def bytes(self) -> int:
        """Of all buffers."""
        return sum(carries.bytes() for carries in (self._partials, *self._sums.values()))

    def start(self) -> None:
        """Begin a pass: nothing of an earlier one is taken."""
        self._pass += 1

    def step(self, place: int, x: Tensor, hidden: int, *, gives: bool, needs: bool) -> "Step":
        """What the sync point at `place` takes and gives.

        Args:
            place: From 0; the first starts a pass.
            x: Its partial, ``[..., hidden]``.
            hidden: Features.
            gives: Whether another one follows.
            needs: Whether the one before sends nothing, so that its carry must not be lost.

        Raises:
            LowbitError: What is needed is not there.
        """
        if place == 0:
            self.start()
        if self._bounded is None or self._bounded.device != x.device:
            with torch.inference_mode(False):
                self._bounded = torch.zeros(1, dtype=torch.int64, device=x.device)
        step = Step(self, place, _Key(self._pass, x.shape, x.dtype), hidden, gives, x.device)
        if place and step.carry.taken is None and self._partials.gave_in(place - 1, self._pass):
            self.dropped += 1
        if needs and step.carry.taken is None:
            raise LowbitError(
                "a sync point of 0 bits has sent nothing, and the next one ran with another shape, "
                "dtype or pass: run the model's layers in order, or plan a recipe without --skip"
            )
        return step

    def by_native(self, place: int) -> bool:
        """The sync point at `place` is summed by the backend alone, if nothing is owed to it.

        Returns:
            False if something is, so that `step` must be asked; True if not, and this is noted.
        """
        if place and self._partials.gave_in(place - 1, self._pass):
            return False
        if place == 0:
            self.start()
        self._partials.forget(place)
        return True

    def sums(self, name: str) -> Carries:
        """The carries of one kind of sum."""
        return self._sums.setdefault(name, Carries(self._slots))


class Step:
    """What one sync point takes and gives.

    Attributes:
        carry: Of this rank's partial, ``[tokens, hidden]``.
        key: What the carries belong to.
    """

    def __init__(
        self,
        chain: Chain,
        place: int,
        key: _Key,
        hidden: int,
        gives: bool,
        device: torch.device,
    ):
        self._chain, self._place, self._hidden = chain, place, hidden
        self._gives, self._device, self.key = gives, device, key
        self.carry = self._of(chain._partials, key.shape[:-1].numel())

    def sums(self, rows: dict[str, int]) -> dict[str, Carry]:
        """Of the sums that this rank owns, by name, with so many rows each.

        Carries of other sums that the place before gave are lost, and counted.
        """
        self._lose_others(rows)
        return {name: self._of(self._chain.sums(name), count) for name, count in rows.items()}

    def sums_taken(self, rows: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
        """Those of `sums` that there are, of a sync point that makes no sums itself."""
        self._lose_others(rows)
        for name, count in rows.items():
            if name in self._chain._sums:
                taken = self._chain._sums[name].take(self._place, self.key, count, self._hidden)
                if taken is not None:
                    yield name, taken

    def pass_on(self, rows: dict[str, int]) -> None:
        """Give the carries of sums on as they are: this sync point sends no sum and no partial."""
        for name, taken in self.sums_taken(rows):
            given = self._of(self._chain.sums(name), len(taken)).given
            if given is not None:
                given.copy_(taken)

    def give_nothing(self) -> None:
        """This sync point leaves no error of its partial behind."""
        self._chain._partials.forget(self._place)

    def _lose_others(self, names: Container[str]) -> None:
        for name, carries in self._chain._sums.items():
            if name not in names and carries.gave_in(self._place - 1, self.key.number):
                self._chain.dropped += 1

    def _of(self, carries: Carries, rows: int) -> Carry:
        place, key, hidden = self._place, self.key, self._hidden
        taken = carries.take(place, key, rows, hidden)
        given = carries.give(place, key, rows, hidden, self._device) if self._gives else None
        return Carry(taken, given, self._chain._bounded)


class Feedback(Protocol):
    """What a collective asks for its step."""

    def step(self, x: Tensor, hidden: int) -> Step:
        """What the call with partial `x` ``[..., hidden]`` takes and gives."""

    def by_native(self) -> bool:
        """In place of `step`: the call goes native; False if it is owed something and must ask."""


class ErrorFeedback:
    """Error feedback for calls of `all_reduce` and `reduce_scatter` without Megatron.

    Pass one object to all calls whose sums are added to the same stream, in order, and call
    `start()` before the first of each pass. What a call could not send in its few bits goes along
    with the next call::

        feedback = megatron_lowbit.ErrorFeedback()
        for tokens in passes:
            feedback.start()
            for layer in layers:
                h = h + megatron_lowbit.all_reduce(layer(h), feedback=feedback)

    All ranks of a group must use it alike. A call of another shape or dtype than the one before
    takes nothing: that one's carry is dropped, and counted. So are those of sums between
    hierarchical and another collective.
    """

    def __init__(self) -> None:
        self._chain = Chain()
        self._place = 0

    def start(self) -> None:
        """Begin a pass: the next call takes nothing."""
        self._place = 0

    def step(self, x: Tensor, hidden: int) -> Step:
        """What the next call takes and gives; called by the collectives."""
        place, self._place = self._place, self._place + 1
        return self._chain.step(place, x, hidden, gives=True, needs=False)

    def by_native(self) -> bool:
        """The next call goes native: noted, unless something is owed to it."""
        is_noted = self._chain.by_native(self._place)
        self._place += is_noted
        return is_noted

    @property
    def dropped(self) -> int:
        """How many carries the next call could not take (`Chain.dropped`)."""
        return self._chain.dropped

    @property
    def bounded(self) -> int:
        """How many rows' carries were scaled down to their bound (`codecs.carry`)."""
        return self._chain.bounded
