"""The low-bit path of one model, once it is on: what runs, what it sent, and the way back."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import torch.distributed as dist
from torch import nn

from megatron_lowbit.codecs import CALIBRATED_CODEC, Codec
from megatron_lowbit.comm.policy.policy import Policy
from megatron_lowbit.comm.traffic import Counters
from megatron_lowbit.integration.assignment import AssignedPoints
from megatron_lowbit.integration.stats import Counted, stats
from megatron_lowbit.integration.sums.chains import bytes_a_token, links
from megatron_lowbit.integration.sums.cuda_graphs import check_no_graphs
from megatron_lowbit.integration.sums.experts import ExpertSum
from megatron_lowbit.integration.sums.folded_weights import Folding
from megatron_lowbit.integration.sums.gathers import Gatherer
from megatron_lowbit.integration.sums.reducer import CodecReducer
from megatron_lowbit.integration.sums.sync_points import SyncPoint, attach


@dataclass(frozen=True)
class SyncPointStatus:
    """What runs at one sync point of this rank.

    Attributes:
        layer: Megatron's layer number.
        name: Path under the layer.
        codec: The codec.
        bf16_features: How many features travel in BF16.
        collective: What sums it; of `auto` with what was timed, and from which size it takes what.
        symmetric_memory: Whether its short messages go over memory that GPUs share: ``on``, or
            ``off: `` and the reason.
        feedback: ``carried`` if the next sync point sends its error along, or why not.
        traffic: What went through it so far; `stats()` has it by collective.
    """

    layer: int
    name: str
    codec: Codec
    bf16_features: int
    collective: str
    symmetric_memory: str
    feedback: str
    traffic: Counters


@dataclass(frozen=True)
class Extras:
    """What a user asked for on top of the sync points.

    Attributes:
        gatherers: All-gathers of sequence parallelism that go in low bits.
        experts: Token dispatchers that sum routed experts' outputs in low bits.
        folding: Rotations in the weights.
    """

    gatherers: Sequence[Gatherer] = ()
    experts: Sequence[ExpertSum] = ()
    folding: Folding | None = None

    def __str__(self) -> str:
        text = ", rotations folded into the weights" if self.folding is not None else ""
        if self.gatherers:
            text += f"; {len(self.gatherers)} all-gathers in {self.gatherers[0].codec}"
        if self.experts:
            text += f"; {len(self.experts)} token dispatchers in {self.experts[0].codec}"
        return text


class Handle:
    """The low-bit path of one model.

    Attributes:
        native: The row-parallel linears of this rank that stay native, with the reason.
        kinds: The sync points of a pass, by codec.
        policy: Which collective its messages take; None where no sync point is in low bits.
        layers: The numbers of this rank's layers, which under pipeline parallelism are not all.
        is_removed: Whether `remove` was called.
    """

    def __init__(
        self,
        model: nn.Module | list[nn.Module],
        assigned: AssignedPoints,
        policy: Policy | None,
        native: dict[str, str],
        extras: Extras,
        stage: tuple[tuple[int, ...], str],
    ):
        self._model, taken = model, set(map(str, extras.experts))
        self.native = {name: why for name, why in native.items() if name not in taken}
        self.policy, self.kinds = policy, assigned.kinds()
        self.layers, self._where = stage
        self._points, self._origin = assigned.points, assigned.origin
        self._extras, folding = extras, extras.folding
        tables = assigned.tables if folding is None else folding.tables
        carrying = links(assigned.points, assigned.codecs)
        self._has_feedback = assigned.has_feedback
        self._links = carrying if assigned.has_feedback else [None] * len(carrying)
        chooses = cast(Policy, policy)  # None only where there are no points
        each = zip(assigned.points, assigned.codecs, tables, self._links, strict=True)
        self._reducers = [
            CodecReducer(codec, table, point.group, chooses, link)
            for point, codec, table, link in each
        ]
        # Of callbacks, not of generators: a handle that nobody keeps would undo its work by those.
        with ExitStack() as attached:
            attached.enter_context(attach(self._points, self._reducers))
            for gatherer in extras.gatherers:
                attached.callback(gatherer.attach())
            for expert in extras.experts:
                attached.callback(expert.attach())
            if folding is not None:
                attached.enter_context(folding)
            self._attached = attached.pop_all()
        self.is_removed = False

    def status(self) -> list[SyncPointStatus]:
        """Each sync point of this rank that runs in low bits; `native` names the others."""
        return [
            SyncPointStatus(
                point.layer,
                point.name,
                reducer.codec,
                reducer.tables.bf16_index.numel(),
                _sums_by(reducer.policy),
                reducer.policy.symmetric_memory.status(reducer.codec),
                self._feedback_at(point, reducer),
                reducer.traffic.total(),
            )
            for point, reducer in zip(self._points, self._reducers, strict=True)
        ]

    def _feedback_at(self, point: SyncPoint, reducer: CodecReducer) -> str:
        if reducer.link is not None:
            return "off: the model is in training mode" if point.module.training else "carried"
        if not self._has_feedback:
            return "off"
        return f"off: {point.apart or 'no other sync point is in its chain'}"

    def feedback(self) -> dict[str, int]:
        """How many sync points carry errors, what that takes, and what could not be carried whole.

        Returns:
            ``sync_points``; ``bytes`` of this rank's carries; ``dropped``: carries that were lost
            as shapes or collectives changed; ``bounded``: rows whose carry was scaled down
            (`codecs.carry`).
        """
        chains = {id(link.chain): link.chain for link in self._links if link}.values()
        return {
            "sync_points": sum(link is not None for link in self._links),
            "bytes": sum(chain.bytes() for chain in chains),
            "dropped": sum(chain.dropped for chain in chains),
            "bounded": sum(chain.bounded for chain in chains),
        }

    def stats(self) -> dict:
        """What this rank sent since `apply`, as JSON can hold it; see `integration.stats`."""
        points = [
            Counted(point.layer, point.name, reducer.codec, reducer.traffic)
            for point, reducer in zip(self._points, self._reducers, strict=True)
        ]
        extras = self._extras
        by_kind = {"all_gathers": extras.gatherers, "experts": extras.experts}
        return stats({"sync_points": points, **by_kind})

    def retune(self) -> None:
        """Time the collectives again, as `apply` did, and decide by that; call it on every rank.

        Between two passes, when nothing else runs on the ranks. What a tuning file says is not
        used any more.

        Raises:
            LowbitError: The collective is fixed, or CUDA graphs were captured, which would go on
                with what they have.
        """
        if self.policy is not None and not self.is_removed:
            check_no_graphs(self._model, "retune()")
            self.policy.retune()

    def remove(self) -> None:
        """Give Megatron's own reduction back, exactly as it was. A second call does nothing.

        Raises:
            LowbitError: CUDA graphs were captured, which would go on in low bits.
        """
        if self._reducers:
            check_no_graphs(self._model, "remove()")
        self._attached.close()
        self._points, self._reducers, self._extras = [], [], Extras()
        self._links = []
        self.is_removed = True

    def __str__(self) -> str:
        if self.is_removed:
            return "low-bit communication: removed"
        native = f"{len(self.native)} stay native" + _listed(self.native)
        if not self._reducers:
            return f"low-bit communication: no sync point{self._where} uses it; {native}"
        policy, ranks = self._reducers[0].policy, dist.get_world_size(self._points[0].group)
        text = (
            f"low-bit communication: {len(self._reducers)} sync points{self._where} use "
            f"{_codecs(self._reducers)} ({self._origin}), {policy.mode} over {ranks} ranks"
        )
        if ranks == 1:
            text += " (one rank: nothing is sent)"
        elif policy.mode == "auto":
            text += f" ({policy.spans()})"
        if self._reducers[0].tables.bf16_index.is_cuda:
            states = {status.symmetric_memory for status in self.status()}
            text += f", symmetric memory {', '.join(sorted(states))}"
        return f"{text}{self._extras}; {self._carried()}; {native}"

    def _carried(self) -> str:
        """How many sync points carry their errors, at what cost, and which do not and why."""
        carrying = sum(link is not None for link in self._links)
        apart = _listed({str(p): p.apart for p in self._points if p.apart and self._has_feedback})
        if not carrying:
            return "errors are not carried" + apart
        first = self._reducers[0]
        ranks = dist.get_world_size(first.group)
        size = bytes_a_token(
            self._points, ranks, sums=first.policy.mode not in ("one-shot", "native")
        )
        text = f"errors carried between {carrying} sync points, {size / 1024:.1f} KB a token"
        return text + apart


def _sums_by(policy: Policy) -> str:
    return f"auto {policy.spans()}" if policy.mode == "auto" else policy.mode


def _codecs(reducers: list[CodecReducer]) -> str:
    """Codecs, bits and BF16 features of all sync points, in words."""
    names = sorted({reducer.codec.name for reducer in reducers})
    hidden = reducers[0].tables.hidden
    kept = [reducer.tables.bf16_index.numel() for reducer in reducers]
    rows = [r.codec.row_bytes(r.tables) for r in reducers]
    sums = [r.codec.for_sum().row_bytes(r.tables.of_sum or r.tables) for r in reducers]
    text = (
        f"{', '.join(names)}, {_span(kept)} of {hidden} features in BF16, "
        f"{8 * sum(rows) / len(rows) / hidden:.2f} bits a value"
    )
    if len(set(rows)) > 1:
        low, high = 8 * min(rows) / hidden, 8 * max(rows) / hidden
        text += f" on average ({low:.2f} to {high:.2f})"
    if any(r.codec.name == CALIBRATED_CODEC and r.tables.center is None for r in reducers):
        text += ", not centred (calibrated at a TP size that this one does not divide)"
    if any(r.codec.sum_bits != r.codec.bits for r in reducers):
        text += f" ({8 * sum(sums) / len(sums) / hidden:.2f} for sums)"
    return text


def _span(counts: list[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}-{max(counts)}"


def _listed(native: dict[str, str]) -> str:
    counts = Counter(native.values())
    return "".join(f" ({count}: {reason})" for reason, count in counts.items())
