"""The interface that every codec keeps, and the tables that it works from.

A codec turns one rank's *partial*, ``[tokens, hidden]``, into a *payload*, ``uint8 [tokens,
row_bytes]``, and the payloads of all ranks into their sum. Every row of a payload is
self-contained, so any split by tokens is a valid split and a token's result never depends on
its neighbours. A row is laid out as

    packed body | a zero byte if the body is odd | BF16 features | BF16 scale, if the codec has one

(`codecs.grouped`: packed body, padding, numbers of the groups).

Codecs are stateless; what calibration knows of a sync point is in its `Tables`.

A two-shot all-reduce quantizes twice: each partial, and then the sum. `reduce_encode` goes from the
payloads of the partials to a payload of the sum, which `for_sum()`, the same codec with the bits of
the sum, decodes by the tables `sum_tables(tables)`.

Non-finite input stays visible: a NaN or an infinity in a token's partial gives NaN in that
token's sum, on every rank, and leaves other tokens untouched.
"""

import abc
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels.peer_memory import PeerMemory


@dataclass(frozen=True)
class Statistics:
    """What calibration knows of the partials of one sync point, or some of it; fp32.

    Attributes:
        ranges: ``[ranks, hidden]``, the paper's R = 2 max(\\|min\\|, \\|max\\|).
        variance: ``[ranks, hidden]``.
        mean: ``[ranks, hidden]``.
        sum_ranges: ``[hidden]``, as `ranges`, of the sum over ranks.
        sum_variance: ``[hidden]``, of the sum over ranks.
    """

    ranges: Tensor | None = None
    variance: Tensor | None = None
    mean: Tensor | None = None
    sum_ranges: Tensor | None = None
    sum_variance: Tensor | None = None

    @classmethod
    def of(cls, partials: Tensor) -> "Statistics":
        """The statistics of ``[ranks, tokens, hidden]``: without Megatron, or to try a codec."""
        partials = partials.float()
        total = partials.sum(dim=0)
        return cls(
            ranges=2 * partials.abs().amax(dim=1),
            variance=partials.var(dim=1, correction=0),
            mean=partials.mean(dim=1),
            sum_ranges=2 * total.abs().amax(dim=0),
            sum_variance=total.var(dim=0, correction=0),
        )


@dataclass(frozen=True)
class Tables:
    """What a codec knows of one sync point before it sees a token.

    Attributes:
        codec: Name of the codec that made them.
        hidden: Features in a token.
        bf16_index: int64 ``[k]``, ascending: the features that travel in BF16.
        body_index: int64 ``[hidden - k]``, ascending: the others (``static-hybrid`` and
            ``scaled-hybrid``).
        scale: fp32 ``[ranks, hidden]``, per rank and feature the value of one quantization step
            (``static-hybrid``) or its size beside other features (``scaled-hybrid``).
        encode_scale: fp32 ``[hidden]``, what a feature is multiplied by before it is rotated, 0
            for the features of the BF16 index (``rotated-hybrid`` and its kin).
        decode_scale: fp32 ``[hidden]``, what it is multiplied by after it is turned back, 0 for the
            features of the BF16 index.
        center: fp32 ``[ranks, hidden]``, what is subtracted from a rank's partial.
        center_sum: fp32 ``[hidden]``, `center` summed in rank order: what is added to the sum.
        of_sum: Tables of the sum over ranks, where they are others than these
            (``static-hybrid`` and ``scaled-hybrid``).
        folded_index: int64 ``[k]``, where a partial has its BF16 features if the weight that made
            it has rotated its body (`codecs.folding`); None for partials as Megatron makes them.
    """

    codec: str
    hidden: int
    bf16_index: Tensor
    body_index: Tensor | None = None
    scale: Tensor | None = None
    encode_scale: Tensor | None = None
    decode_scale: Tensor | None = None
    center: Tensor | None = None
    center_sum: Tensor | None = None
    of_sum: "Tables | None" = None
    folded_index: Tensor | None = None

    @property
    def width(self) -> int:
        """Values of a token's partial: the features, and with a folded weight k more behind."""
        return self.hidden + (0 if self.folded_index is None else self.folded_index.numel())

    def to(self, device: torch.device | str) -> "Tables":
        """The same tables on `device`."""
        kinds = (Tensor, Tables)
        moved = {k: v.to(device) if isinstance(v, kinds) else v for k, v in vars(self).items()}
        return Tables(**moved)

    def of_ranks(self, start: int, stop: int) -> "Tables":
        """The tables of a group of ranks ``[start, stop)`` of these."""
        return self._by_rank(lambda rows: rows[start:stop])

    def of_nodes(self, nodes: int) -> "Tables":
        """Tables for the sums inside each of `nodes` equal nodes, a row a node.

        A node's sum is at most the sum of its ranks' ranges, so it clips nothing that the ranks
        themselves would not.
        """
        return self._by_rank(lambda rows: rows.unflatten(0, (nodes, -1)).sum(dim=1))

    def _by_rank(self, change: Callable[[Tensor], Tensor]) -> "Tables":
        """With what has a row for each rank changed."""
        changed = self
        if self.scale is not None:
            changed = replace(changed, scale=change(self.scale))
        if self.center is not None:
            center = change(self.center)
            changed = replace(changed, center=center, center_sum=sum_in_rank_order(center))
        return changed


class Codec(abc.ABC):
    """A way to write a partial into bytes and to read a sum out of them.

    Attributes:
        name: The name users choose it by.
        supported_bits: Bits that a body value can have, the default first.
        bits: Bits of one body value of a partial.
        sum_bits: Bits of one body value of the sum, in collectives that send it.
        needs_statistics: Whether `tables` needs statistics of this very TP degree.
        takes_index: Whether features apart from the body mean anything to it.
        symmetric: Whether there are kernels for `all_reduce_in`.
    """

    name: str
    supported_bits: tuple[int, ...]
    needs_statistics = False
    takes_index = True
    symmetric = False

    def __init__(self, bits: int | None = None, *, sum_bits: int | None = None):
        self.bits = self.supported_bits[0] if bits is None else bits
        self.sum_bits = self.bits if sum_bits is None else sum_bits
        for asked in (self.bits, self.sum_bits):
            if asked not in self.supported_bits:
                supported = ", ".join(map(str, sorted(self.supported_bits, reverse=True)))
                raise LowbitError(
                    f"codec {self.name} has no {asked}-bit version: choose from {supported}"
                )

    def default_bf16_features(self, hidden: int) -> int:
        """How many features travel in BF16 when the user does not say: 0 without an index."""
        assert not self.takes_index, f"{self.name} takes an index and must say how large it is"
        return 0

    def tables(
        self,
        hidden: int,
        *,
        bf16_index: Tensor | None = None,
        statistics: Statistics | None = None,
        device: torch.device | str | None = None,
    ) -> Tables:
        """Build the tables of one sync point; here, for a codec that takes no index.

        Args:
            hidden: Features in a token.
            bf16_index: Integer ``[k]``, the features that travel in BF16, in any order; none if
                left out.
            statistics: Of this sync point, for codecs that use them.
            device: Where the tables live.

        Raises:
            LowbitError: The index has a feature twice or outside the token, or statistics that the
                codec needs are missing or have another shape.
        """
        assert not self.takes_index, f"{self.name} takes an index and must make its own tables"
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
        two_shot: bool,
        out: Tensor,
        trap: bool = True,
    ) -> None:
        """Sum `partial` over the ranks that share a memory, in one kernel, where there is one.

        Args:
            memory: Shared by the ranks, and large enough (`PeerMemory.holds`).
            partial: Floating point ``[tokens, hidden]``, the same shape on every rank.
            tables: Of this sync point.
            two_shot: Each rank sums a share of the tokens and sends the sum, instead of all.
            out: Floating point ``[tokens, hidden]`` that the sum is rounded into: the bits that
                encoding, sending and decoding give. It may be `partial`.
            trap: Whether a rank that does not come in time ends the kernel with an error.
        """
        raise NotImplementedError(f"{self.name} has no kernels for symmetric memory")

    def for_sum(self) -> "Codec":
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
                "tables(), calibrate again with tools/calibrate.py, or use one-shot"
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

    def __repr__(self) -> str:
        second = "" if self.sum_bits == self.bits else f"+{self.sum_bits}"
        return f"{self.name} ({self.bits}{second} bits)"


def sum_in_rank_order(values: Tensor) -> Tensor:
    """fp32 sum of ``[ranks, ...]`` over ranks: ((r0 + r1) + r2) + ..., on any device the same."""
    total = values[0].float()
    for value in values[1:]:
        total = total + value.float()
    return total


def rounded_into(out: Tensor | None, total: Tensor) -> Tensor:
    """`total` itself, or `out` with its values: the end of every `Codec.decode_sum`."""
    return total if out is None else out.copy_(total)


def check_index(bf16_index: Tensor | None, hidden: int, device: torch.device | str) -> Tensor:
    """Return the BF16 index as ascending int64 on `device`, or say what is wrong with it."""
    if bf16_index is None:
        return torch.empty(0, dtype=torch.int64, device=device)
    index = bf16_index.to(torch.int64).flatten().sort().values
    if index.numel() and (index[0] < 0 or index[-1] >= hidden):
        bad = index[0].item() if index[0] < 0 else index[-1].item()
        raise LowbitError(f"BF16 index has feature {bad}, outside a hidden size of {hidden}")
    repeated = index[1:][index[1:] == index[:-1]]
    if repeated.numel():
        raise LowbitError(f"BF16 index has feature {repeated[0].item()} more than once")
    return index.to(device)


def other_features(bf16_index: Tensor, hidden: int) -> Tensor:
    """The features outside the BF16 index: int64 ``[hidden - k]``, ascending."""
    is_body = torch.ones(hidden, dtype=torch.bool, device=bf16_index.device)
    is_body[bf16_index] = False
    return is_body.nonzero().flatten()


def put_in_place(body: Tensor, kept: Tensor, tables: Tables) -> Tensor:
    """Every feature to its place: fp32 ``[tokens, hidden]`` of the body's and the BF16 index's."""
    place = torch.cat([tables.body_index, tables.bf16_index]).argsort()
    return torch.cat([body, kept], dim=1).index_select(1, place)
