"""The policy of a group is made here: fixed, or by times that are taken or read from a file."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lowbit.codecs import Codec, Tables
from megatron_lowbit.comm.agreement import gather_values, on_every_rank, require_equal
from megatron_lowbit.comm.hierarchical import Nodes, make_nodes, node_size, spans_nodes
from megatron_lowbit.comm.policy.measurement import time_collectives
from megatron_lowbit.comm.policy.policy import Policy, Settings
from megatron_lowbit.comm.policy.runs import LARGEST, Place
from megatron_lowbit.comm.policy.timings import ByTimes, Kind, size_text
from megatron_lowbit.comm.policy.tuning import Tuning, read_tuning, this_machine
from megatron_lowbit.comm.symmetric_memory import open_symmetric_memory
from megatron_lowbit.errors import LowbitError

# For a tuning file, which is there to stay: rounds of a size, and calls of a run of short ones.
_ROUNDS, _CALLS = 768, 64
_KINDS = 3  # that are timed at load, about: more of them would leave too few rounds


def make_policy(
    settings: Settings,
    *,
    group: dist.ProcessGroup,
    device: torch.device,
    codec: Codec | None = None,
    tables: Tables | None = None,
    kinds: Sequence[Kind] = (),
    dtype: torch.dtype = torch.bfloat16,
    scatters: bool = True,
    largest: int = LARGEST,
) -> Policy:
    """Make the policy of a group; call it on every rank of it.

    Args:
        settings: The same on every rank.
        group: The ranks that all-reduce.
        device: Where the partials are.
        codec: Of all messages, the same on every rank. Left out where there are `kinds`.
        tables: Of one sync point. Left out where there are `kinds`.
        kinds: The sync points of a pass that has several codecs, or carries errors.
        dtype: Of the partials.
        scatters: Whether there may be reduce-scatters. `auto` keeps those native otherwise.
        largest: Bytes in BF16 of the longest message that `auto` takes times of.

    Raises:
        LowbitError: On every rank: a tuning file that does not serve here or has no times of
            a codec, node boundaries that are unknown or wrong, a codec without statistics of the
            sum in a mode that sends it, ranks with different settings.
    """
    require_equal("collective", str(settings), group=group)
    if dist.get_world_size(group) == 1:
        return Policy("native")
    if not kinds:
        assert codec is not None and tables is not None, "give a codec and tables, or kinds"
        kinds = (Kind(codec, tables),)
    size = on_every_rank(lambda: _node_size(settings, group), group=group)
    nodes = None
    if size is not None:
        nodes = make_nodes(group, size=size, low_bit_inside=settings.low_bit_inside)
    by_nodes = nodes is not None and settings.mode == "hierarchical" and nodes.sends_sums
    if settings.mode == "two-shot" or by_nodes:
        for kind in kinds:
            kind.codec.sum_tables(kind.tables)
    if settings.mode in ("native", "hierarchical"):
        return Policy(settings.mode, nodes=nodes)
    if settings.mode != "auto":
        memory = open_symmetric_memory(group, device)
        return Policy(settings.mode, nodes=nodes, symmetric_memory=memory)
    place = replace(_place(kinds, group, nodes, device), dtype=dtype, scatters=scatters)
    place = replace(place, largest=min(largest, LARGEST))

    def measure() -> ByTimes:
        return _measured(kinds, place)

    if (file := settings.tuning) is None:
        times = measure()
    else:
        tuning = on_every_rank(lambda: _read(file, kinds, group), group=group)
        read = (tuning.node_size, sorted(tuning.timings.times.items()))
        require_equal("tuning file", read, group=group)
        times = _by_tuning(tuning, kinds, place, nodes)
    memory = place.policies["one-shot"].symmetric_memory
    return Policy("auto", nodes=nodes, times=times, measure=measure, symmetric_memory=memory)


def take_tuning(
    kinds: Sequence[Kind],
    *,
    group: dist.ProcessGroup,
    device: torch.device,
    seconds: float,
    sizes: Sequence[int] | None = None,
    largest: int = LARGEST,
    scatters: bool = True,
    node_size: int | None = None,
    link: str = "as it is",
) -> Tuning:
    """Take times for a tuning file; call it on every rank of `group`.

    Args:
        kinds: The sync points of a pass. They are timed until it is sure which way it goes best.
        group: The ranks that will all-reduce.
        device: Where the partials are.
        seconds: For all of it; as long as it takes if `sizes` take longer.
        sizes: Bytes of the messages in BF16; in steps of 4 up to `largest` if left out.
        largest: Bytes of the longest message in BF16.
        scatters: Whether to time reduce-scatters, too: in half of the seconds.
        node_size: Ranks in a node, for hierarchical.
        link: What joins the ranks, in words.
    """
    nodes = None if node_size is None else make_nodes(group, size=node_size)
    place = _place(kinds, group, nodes, device)
    place = replace(place, largest=largest, scatters=scatters, calls=_CALLS)
    timings = time_collectives(kinds, place, seconds=seconds, rounds=_ROUNDS, sizes=sizes)
    return Tuning(this_machine(group), dist.get_world_size(group), node_size, link, timings)


def _place(
    kinds: Sequence[Kind],
    group: dist.ProcessGroup,
    nodes: Nodes | None,
    device: torch.device,
) -> Place:
    memory = open_symmetric_memory(group, device)
    policies = {
        name: Policy(name, nodes=nodes, symmetric_memory=memory)
        for name in candidates(kinds, nodes)
    }
    return Place(group, policies, device)


def candidates(kinds: Sequence[Kind], nodes: Nodes | None = None) -> list[str]:
    """The low-bit all-reduces that all of `kinds` can go by."""
    if any(k.codec.needs_statistics and k.tables.of_sum is None for k in kinds):
        return ["one-shot"]
    return ["one-shot", "two-shot"] if nodes is None else ["one-shot", "two-shot", "hierarchical"]


def _measured(kinds: Sequence[Kind], place: Place) -> ByTimes:
    """By times that are taken now."""
    start = time.perf_counter()
    timed = _stand_ins(_sent(kinds) or kinds)
    timings = time_collectives(timed, place)
    seconds = max(gather_values(time.perf_counter() - start, group=place.group))
    sizes = timings.sizes()
    how = (
        f"times of this group, {size_text(sizes[0])} to {size_text(sizes[-1])}, "
        f"taken in {seconds:.1f} s"
    )
    return ByTimes(timings, timed, _collectives(place), source="times of this group", how=how)


def _stand_ins(kinds: Sequence[Kind]) -> list[Kind]:
    """Few kinds for all, each for itself and for those that take no longer: about three.

    One that has most of a pass stands for itself, and so does what none of the others stands for.
    """
    if len(kinds) <= _KINDS:
        return list(kinds)
    ordered = sorted(kinds, key=lambda kind: (kind.codec.name, kind.carries, *_bits(kind)))
    total, seen, chosen = sum(kind.count for kind in kinds), 0, list[Kind]()
    for number, kind in enumerate(ordered, 1):
        seen += kind.count
        is_third = seen * _KINDS >= (len(chosen) + 1) * total
        if is_third or not any(_takes_as_long(one, kind) for one in ordered[number : number + 1]):
            chosen.append(replace(kind, count=seen - sum(one.count for one in chosen)))
    return chosen


def _takes_as_long(kind: Kind, other: Kind) -> bool:
    """As another one, or longer."""
    is_same = kind.codec.name == other.codec.name and kind.carries >= other.carries
    return is_same and all(a >= b for a, b in zip(_bits(kind), _bits(other), strict=True))


def _bits(kind: Kind) -> tuple[int, int]:
    return kind.codec.bits, kind.codec.sum_bits


def _by_tuning(tuning: Tuning, kinds: Sequence[Kind], place: Place, nodes: Nodes | None) -> ByTimes:
    candidates = _collectives(place)
    if nodes is not None and tuning.node_size != nodes.size:
        candidates.remove("hierarchical")
    timed = _sent(kinds) or kinds
    return ByTimes(tuning.timings, timed, candidates, source=Path(tuning.origin).name)


def _sent(kinds: Sequence[Kind]) -> list[Kind]:
    """Those of 0 bits are never sent, and have no times."""
    return [kind for kind in kinds if kind.codec.bits]


def _collectives(place: Place) -> list[str]:
    return [*place.policies, *(["reduce-scatter"] if place.scatters else [])]


def _node_size(settings: Settings, group: dist.ProcessGroup) -> int | None:
    """Ranks of the group in a node where hierarchical is asked for or possible, else None."""
    ranks = dist.get_world_size(group)
    if settings.mode not in ("hierarchical", "auto"):
        return None
    if settings.mode == "auto" and settings.node_size is None:
        return _node_size_of_auto(group)
    size = settings.node_size or node_size(group)
    if size < 1 or ranks % size:
        raise LowbitError(
            f"nodes of {size} ranks do not divide a group of {ranks}: give --lowbit-node-size a "
            "number that does"
        )
    if size == ranks:
        raise LowbitError(
            f"hierarchical needs several nodes, and all {ranks} ranks are on one: use two-shot, or "
            "give the ranks of a node (--lowbit-node-size)"
        )
    return size


def _node_size_of_auto(group: dist.ProcessGroup) -> int | None:
    """Of a group over nodes; None if it lies unevenly there, where the flat collectives serve."""
    if not spans_nodes(group):
        return None
    try:
        return node_size(group)
    except LowbitError:
        return None


def _read(path: Path, kinds: Sequence[Kind], group: dist.ProcessGroup) -> Tuning:
    tuning = read_tuning(path, group=group)
    missing = tuning.timings.missing(_sent(kinds), "one-shot")
    if missing:
        raise LowbitError(
            f"{path} has no times of {missing[0]}, only of {', '.join(tuning.codecs())}: make it "
            "with python -m megatron_lowbit doctor --load CKPT, or measure that codec with "
            "python -m megatron_lowbit bench-all-reduce --write-tuning (its --codecs)"
        )
    return tuning
