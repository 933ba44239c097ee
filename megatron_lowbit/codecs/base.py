"""The interface that every codec keeps, and the tables that it works from.

A codec turns one rank's *partial*, ``[tokens, hidden]``, into a *payload*, ``uint8 [tokens,
row_bytes]``, and the payloads of all ranks into their sum. Every row of a payload is
self-contained, so any split by tokens is a valid split and a token's result never depends on
its neighbours. A row is laid out as

    packed body | a zero byte if the body is odd | BF16 features | BF16 scale, if the codec has one

(`codecs.peers.group_frame`: packed body, padding, numbers of the groups).

Codecs are stateless; what calibration knows of a sync point is in its
`codecs.tables.Tables`.

A two-shot all-reduce quantizes twice: each partial, and then the sum. `reduce_encode` goes from the
payloads of the partials to a payload of the sum, which `for_sum()`, the same codec with the bits of
the sum, decodes by the tables `sum_tables(tables)`.

Non-finite input stays visible: a NaN or an infinity in a token's partial gives NaN in that
token's sum, on every rank, and leaves other tokens untouched.
"""

import abc
import copy
from types import ModuleType
from typing import Self

import torch
from torch import Tensor

from megatron_lowbit.codecs.carry import NO_CARRY, Carry
from megatron_lowbit.codecs.tables import Statistics, Tables, check_index
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels.peer_memory import PeerMemory


class Codec(abc.ABC):
    """A way to write a partial into bytes and to read a sum out of them.

    Attributes:
        name: The name users choose it by.
        supported_bits: Bits that a body value can have, the default first.
        bits: Bits of one body value of a partial.
        sum_bits: Bits of one body value of the sum, in collectives that send it.
        needs_statistics: Whether `tables` needs statistics of this very TP degree.
        takes_index: Whether it sends the features of a BF16 index apart from the body.
        carries: Whether sync points carry errors by default (`codecs.carry`); they can with any.
        can_skip: Whether it has a version of 0 bits, which sends nothing: the calibrated mean
            stands for the sum, and error feedback (`codecs.carry`) brings the rest later.
    """

    name: str
    supported_bits: tuple[int, ...]
    needs_statistics = False
    takes_index = True
    carries = False
    can_skip = False

    def __init__(self, bits: int | None = None, *, sum_bits: int | None = None):
        self.bits = self.supported_bits[0] if bits is None else bits
        self.sum_bits = self.bits if sum_bits is None else sum_bits
        for asked in (self.bits, self.sum_bits):
            if asked not in self.supported_bits and not (asked == 0 and self.can_skip):
                supported = ", ".join(map(str, sorted(self.supported_bits, reverse=True)))
                raise LowbitError(
                    f"codec {self.name} has no {asked}-bit version: choose from {supported}"
                )
        if self.bits != self.sum_bits and 0 in (self.bits, self.sum_bits):
            raise LowbitError(
                f"codec {self.name} cannot have bits {self.bits},{self.sum_bits}: 0 bits send no "
                "message at all, and stand alone"
            )

    @property
    def takes_symmetric_memory(self) -> bool:
        """Whether there are kernels for `all_reduce_in`."""
        return False

    def default_bf16_features(self, hidden: int) -> int:
        """How many features travel in BF16 when the user does not say: 0 for a codec without."""
        assert not self.takes_index, f"{self.name} takes BF16 features and must say how many"
        return 0

    def tables(
        self,
        hidden: int,
        *,
        bf16_index: Tensor | None = None,
        statistics: Statistics | None = None,
        device: torch.device | str | None = None,
    ) -> Tables:
        """Build the tables of one sync point; here, for a codec without BF16 features.

        Args:
            hidden: Features in a token.
            bf16_index: Integer ``[k]``, the features that travel in BF16, in any order; none if
                left out.
            statistics: Of this sync point, for codecs that use them.
            device: Where the tables live.

        Raises:
            LowbitError: A BF16 feature is named twice or outside the token, or statistics that the
                codec needs are missing or have another shape.
        """
        assert not self.takes_index, f"{self.name} takes BF16 features and must make its own tables"
        index = check_index(None, hidden, device or "cpu")
        return Tables(codec=self.name, hidden=hidden, bf16_index=index)

    @abc.abstractmethod
    def row_bytes(self, tables: Tables) -> int:
        """Bytes of one token's row."""

    @abc.abstractmethod
    def encode(self, partial: Tensor, tables: Tables, *, rank: int = 0) -> Tensor:
        """Write a partial into a payload.

        Args:
            partial: Floating point ``[tokens, hidden]``, contiguous or not.
            tables: Of this sync point.
            rank: The rank in the group whose partial it is.

        Returns:
            ``uint8 [tokens, row_bytes]``, contiguous.
        """

    def encode_with_carry(
        self, partial: Tensor, tables: Tables, carry: Carry, *, rank: int = 0
    ) -> Tensor:
        """`encode` with error feedback: `codecs.carry` says what is added, kept and rounded.

        Args:
            partial: As for `encode`.
            tables: As for `encode`.
            carry: What is taken and where the new error goes. Rows as those of `partial`.
            rank: As for `encode`.

        Returns:
            The payload, as `encode`.
        """
        if carry.taken is None and carry.given is None:
            return self.encode(partial, tables, rank=rank)
        wanted = carry.added_to(partial)
        payload = self.encode(wanted, tables, rank=rank)
        if carry.given is not None:
            sent = self.decode_sum(payload[None], tables.of_ranks(rank, rank + 1))
            carry.keep(wanted, sent, bound=self.bits > 0)
        return payload

    @abc.abstractmethod
    def decode_sum(self, payloads: Tensor, tables: Tables, *, out: Tensor | None = None) -> Tensor:
        """Sum the partials of all ranks from their payloads, in fp32 and in rank order.

        Args:
            payloads: ``uint8 [ranks, tokens, row_bytes]``.
            tables: Of this sync point.
            out: Floating point ``[tokens, hidden]`` that the sum is rounded into; a new fp32
                tensor if left out.

        Returns:
            `out`: the same bits wherever the same payloads are decoded.
        """

    def kernels(self, values: Tensor, tables: Tables) -> ModuleType | None:
        """The module of kernels that serves these tensors; None where plain torch does."""
        return None

    def all_reduce_in(
        self,
        memory: PeerMemory,
        partial: Tensor,
        tables: Tables,
        *,
        chunk: int,
        out: Tensor,
        carry: Carry = NO_CARRY,
        of_sum: Carry = NO_CARRY,
        trap: bool = True,
    ) -> None:
        """Sum `partial` over the ranks that share a memory, in one kernel, where there is one.

        Args:
            memory: Shared by the ranks, and large enough (`PeerMemory.holds`).
            partial: Floating point ``[tokens, hidden]``, the same shape on every rank.
            tables: Of this sync point.
            chunk: In two-shot, the tokens that are shared out at once to the ranks that sum them
                (`comm.transport.chunks`); 0 in one-shot, where each rank sums all.
            out: Floating point ``[tokens, hidden]`` that the sum is rounded into: the bits that
                encoding, sending and decoding give. It may be `partial`.
            carry: Error feedback of this rank's partial, ``[tokens, hidden]``.
            of_sum: Of the sums that this rank owns in two-shot, ``[share, hidden]``.
            trap: Whether a rank that does not come in time ends the kernel with an error.
        """
        raise NotImplementedError(f"{self.name} has no kernels for symmetric memory")

    def for_sum(self) -> Self:
        """This codec with the bits of the sum: what decodes the payloads of `reduce_encode`."""
        codec = copy.copy(self)
        codec.bits = self.sum_bits
        return codec

    def sum_tables(self, tables: Tables) -> Tables:
        """The tables of the sum over ranks.

        Raises:
            LowbitError: The codec needs calibrated statistics of the sum and `tables` has none.
        """
        if self.needs_statistics and tables.of_sum is None:
            raise LowbitError(
                f"{self.name} has no calibrated statistics of the sum here: give them to "
                "tables(), calibrate again (python -m megatron_lowbit calibrate), or use one-shot"
            )
        return tables.of_sum or tables

    def reduce_encode(self, payloads: Tensor, tables: Tables) -> Tensor:
        """Sum the partials of all ranks and write the sum into a payload of `for_sum()`.

        Args:
            payloads: ``uint8 [ranks, tokens, row_bytes]``.
            tables: Of this sync point.

        Returns:
            ``uint8 [tokens, for_sum().row_bytes(sum_tables(tables))]``, contiguous: the same bits
            wherever the same payloads are reduced.
        """
        total = self.decode_sum(payloads, tables)
        return self.for_sum().encode(total, self.sum_tables(tables))

    def reduce_encode_with_carry(self, payloads: Tensor, tables: Tables, carry: Carry) -> Tensor:
        """`reduce_encode` with error feedback of the sum.

        The sum is turned back to features in fp32, since the next sync point has other tables.

        Args:
            payloads: As for `reduce_encode`.
            tables: As for `reduce_encode`.
            carry: Of the sum; rows as those of `payloads`.

        Returns:
            The payload of the sum, as `reduce_encode`.
        """
        if carry.taken is None and carry.given is None:
            return self.reduce_encode(payloads, tables)
        total = self.decode_sum(payloads, tables)
        return self.for_sum().encode_with_carry(total, self.sum_tables(tables), carry)

    def __repr__(self) -> str:
        second = "" if self.sum_bits == self.bits else f"+{self.sum_bits}"
        return f"{self.name} ({self.bits}{second} bits)"


def rounded_into(out: Tensor | None, total: Tensor) -> Tensor:
    """`total` itself, or `out` with its values: the end of every `Codec.decode_sum`."""
    return total if out is None else out.copy_(total)
