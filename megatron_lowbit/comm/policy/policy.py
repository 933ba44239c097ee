"""The policy: by which collective a message goes, the same on every rank.

A fixed mode takes one collective for every message, so that a token's result never depends on the
batch that it is in. `auto` takes the fastest for the message's size: by the times of a tuning file
(`comm.policy.tuning`) if there is one, else by the cost model (`comm.policy.cost_model`) with
figures measured when the model is loaded (`comm.policy.probe`). Both come to all ranks with the
same bits, and a message has the same size on all ranks, so all choose alike. Low bits are taken
only where they promise to save at least `_MARGIN` of native's time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lowbit._moved import renamed
from megatron_lowbit.codecs import Codec, Tables
from megatron_lowbit.comm.agreement import on_every_rank, require_equal
from megatron_lowbit.comm.hierarchical import Nodes, make_nodes, node_size, spans_nodes
from megatron_lowbit.comm.policy import cost_model
from megatron_lowbit.comm.policy.cost_model import BF16_BYTES, Message
from megatron_lowbit.comm.policy.probe import probe
from megatron_lowbit.comm.policy.tuning import Tuning, read_tuning
from megatron_lowbit.comm.symmetric_memory import NOT_OPENED, SymmetricMemory, open_symmetric_memory
from megatron_lowbit.comm.traffic import Decision
from megatron_lowbit.errors import LowbitError

MODES = ("auto", "native", "one-shot", "two-shot", "hierarchical")
DEFAULT_MODE = "auto"
# Measurements scatter by a few percent, and native is exact.
_MARGIN = 0.1

Seconds = Callable[[str, int], float | None]


@dataclass(frozen=True)
class Settings:
    """What the user says about collectives.

    Attributes:
        mode: One of `MODES`.
        tuning: A tuning file for `auto`; the cost model without one.
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
    """Chooses a collective for each message of one group and codec.

    Attributes:
        mode: One of `MODES`.
        nodes: The two levels of the group, where hierarchical is possible.
        symmetric_memory: The memory that short messages go through, or why there is none.
    """

    def __init__(
        self,
        mode: str,
        *,
        nodes: Nodes | None = None,
        seconds: Seconds | None = None,
        source: str = "",
        candidates: tuple[str, ...] = (),
        symmetric_memory: SymmetricMemory = NOT_OPENED,
    ):
        self.mode, self.nodes, self.symmetric_memory = mode, nodes, symmetric_memory
        self._seconds, self._source, self._candidates = seconds, source, candidates
        self._known: dict[tuple[str, int], Decision] = {}

    def all_reduce(self, values: int) -> Decision:
        """The collective for an all-reduce of so many values."""
        if self.mode != "auto":
            return Decision(self.mode, "fixed")
        return self._fastest("native", self._candidates, values)

    def reduce_scatter(self, values: int) -> Decision:
        """Low bits or native for a reduce-scatter of so many values."""
        if self.mode == "auto":
            return self._fastest("native reduce-scatter", ("reduce-scatter",), values)
        low = "native reduce-scatter" if self.mode == "native" else "reduce-scatter"
        return Decision(low, "fixed")

    def spans(self) -> str:
        """From which message size `auto` takes which collective, in words."""
        parts, last = [], None
        for exponent in range(12, 28):
            name = self.all_reduce((1 << exponent) // BF16_BYTES).collective
            if name != last:
                parts.append(name if last is None else f"{name} from {_size(1 << exponent)}")
            last = name
        return f"by {self._source}: {', '.join(parts)}"

    def _fastest(self, native: str, candidates: tuple[str, ...], values: int) -> Decision:
        key = (native, values)
        if key not in self._known:
            assert self._seconds is not None, "auto is made with times"
            times = {name: self._seconds(name, values) for name in (native, *candidates)}
            measured = {name: time for name, time in times.items() if time is not None}
            best = min(measured, key=measured.__getitem__, default=native)
            if native in measured and measured[best] > (1 - _MARGIN) * measured[native]:
                best = native
            self._known[key] = Decision(best, f"fastest by {self._source}")
        return self._known[key]


def make_policy(
    settings: Settings,
    *,
    group: dist.ProcessGroup,
    codec: Codec,
    tables: Tables,
    device: torch.device,
) -> Policy:
    """Make the policy of a group; call it on every rank of it.

    Args:
        settings: The same on every rank.
        group: The ranks that all-reduce.
        codec: The same on every rank.
        tables: Of one sync point.
        device: Where the partials are.

    Raises:
        LowbitError: On every rank: a tuning file that does not serve here or has no times of
            `codec`, node boundaries that are unknown or wrong, a codec without statistics of the
            sum in a mode that sends it, ranks with different settings.
    """
    require_equal("collective", str(settings), group=group)
    if dist.get_world_size(group) == 1:
        return Policy("native")
    if settings.mode == "two-shot":
        codec.sum_tables(tables)
    size = on_every_rank(lambda: _node_size(settings, group), group=group)
    nodes = None
    if size is not None:
        nodes = make_nodes(group, size=size, low_bit_inside=settings.low_bit_inside)
    if settings.mode in ("native", "hierarchical"):
        return Policy(settings.mode, nodes=nodes)
    symmetric_memory = open_symmetric_memory(group, device)
    if settings.mode != "auto":
        return Policy(settings.mode, nodes=nodes, symmetric_memory=symmetric_memory)
    candidates = ["one-shot"]
    if not codec.needs_statistics or tables.of_sum is not None:
        candidates += ["two-shot"] if nodes is None else ["two-shot", "hierarchical"]
    if (file := settings.tuning) is None:
        seconds, source = _by_cost_model(codec, tables, group, nodes, device), "the cost model"
    else:
        tuning = on_every_rank(lambda: _read(file, codec, group), group=group)
        require_equal("tuning file", sorted(tuning.times.items()), group=group)
        seconds, source = _by_tuning(tuning, codec, nodes), file.name
    return Policy(
        "auto",
        nodes=nodes,
        seconds=seconds,
        source=source,
        candidates=tuple(candidates),
        symmetric_memory=symmetric_memory,
    )


def _node_size(settings: Settings, group: dist.ProcessGroup) -> int | None:
    """Ranks of the group in a node where hierarchical is asked for or possible, else None."""
    ranks = dist.get_world_size(group)
    if settings.mode not in ("hierarchical", "auto"):
        return None
    if settings.mode == "auto" and settings.node_size is None and not spans_nodes(group):
        return None
    size = settings.node_size or node_size(group)
    if size < 1 or ranks % size:
        raise LowbitError(f"nodes of {size} ranks do not divide a group of {ranks}")
    if size == ranks:
        raise LowbitError(
            f"hierarchical needs several nodes, and all {ranks} ranks are on one: use two-shot, or "
            "give the ranks of a node (--lowbit-node-size)"
        )
    return size


def _read(path: Path, codec: Codec, group: dist.ProcessGroup) -> Tuning:
    tuning = read_tuning(path, group=group)
    if repr(codec) not in tuning.codecs():
        raise LowbitError(
            f"{path} has no times of {codec!r}, only of {', '.join(tuning.codecs())}: measure it "
            "with python -m megatron_lowbit bench-all-reduce --write-tuning (its --codecs chooses "
            "what it measures)"
        )
    return tuning


def _by_tuning(tuning: Tuning, codec: Codec, nodes: Nodes | None) -> Seconds:
    def seconds(collective: str, values: int) -> float | None:
        if collective == "hierarchical":
            assert nodes is not None, "no candidate without nodes"
            if tuning.node_size != nodes.size:
                return None
        name = "" if collective.startswith("native") else repr(codec)
        return tuning.seconds(name, collective, BF16_BYTES * values)

    return seconds


def _by_cost_model(
    codec: Codec,
    tables: Tables,
    group: dist.ProcessGroup,
    nodes: Nodes | None,
    device: torch.device,
) -> Seconds:
    costs = probe(codec, tables, group, agree=group, device=device)
    inside = between = costs
    if nodes is not None:
        inside = probe(codec, tables, nodes.inside, agree=group, device=device)
        between = probe(codec, tables, nodes.between, agree=group, device=device)
    partial_bytes = codec.row_bytes(tables) / tables.hidden
    sum_bytes = codec.for_sum().row_bytes(tables.of_sum or tables) / tables.hidden

    def seconds(collective: str, values: int) -> float:
        message = Message(values, dist.get_world_size(group), partial_bytes, sum_bytes)
        if collective == "hierarchical":
            assert nodes is not None, "no candidate without nodes"
            return cost_model.hierarchical(
                message,
                between,
                node_size=nodes.size,
                inside=inside,
                low_bit_inside=nodes.codec_inside is None,
            )
        return cost_model.FORMULAS[collective](message, costs)

    return seconds


def _size(count: int) -> str:
    return f"{count >> 20} MB" if count >= 1 << 20 else f"{count >> 10} KB"


__getattr__ = renamed(__name__)
