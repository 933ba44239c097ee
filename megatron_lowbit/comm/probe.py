"""The cost model's figures for this machine, group and codec, from a short measurement.

`auto` without a tuning file takes them once, when the model is loaded: a quarter of a second on a
fast link, a few seconds on one of 100 Mbit/s. The slowest rank's figures are everyone's,
so all ranks choose alike.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_lowbit.codecs import Codec, Tables
from megatron_lowbit.comm.cost_model import BF16_BYTES, Costs
from megatron_lowbit.comm.transport import Channel

_REPEATS = 5
# Bytes: enough for the bandwidth to show, few enough for a link of 100 Mbit/s.
_LARGE = 1 << 19
_CODEC_VALUES = 1 << 18


def probe(
    codec: Codec,
    tables: Tables,
    group: dist.ProcessGroup,
    *,
    agree: dist.ProcessGroup,
    device: torch.device,
) -> Costs:
    """Measure; call it on every rank of `agree`.

    Args:
        codec: The same on every rank.
        tables: Of one sync point.
        group: The ranks that will communicate.
        agree: The ranks that must come to the same figures: `group`, or a group of such groups.
        device: Where the partials are.

    Returns:
        The same figures on every rank.
    """
    links = _link_seconds(tables.hidden, group, device)
    figures = torch.tensor([*links, *_codec_seconds(codec, tables, group, device)])
    figures = figures.to(device)
    dist.all_reduce(figures, op=dist.ReduceOp.MAX, group=agree)
    step, byte, native, native_byte, call, encode, decode, turn = figures.tolist()
    return Costs(
        latency=step + call,
        bandwidth=1 / byte,
        native_latency=native,
        native_bandwidth=1 / native_byte,
        encode=encode,
        decode=decode,
        turn=turn,
        per_chunk=step,
    )


def _link_seconds(hidden: int, group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """Of a small exchange, a byte of a large one, a small native all-reduce, a byte of a large."""
    ranks, channel = dist.get_world_size(group), Channel(group, 0)

    def exchange(size: int) -> float:
        payload = torch.zeros(ranks, size, dtype=torch.uint8, device=device)

        def step() -> None:
            channel.exchange(ranks, size, device).send(payload).wait()

        return _seconds(step, group, device)

    def native(size: int) -> float:
        values = torch.zeros(size, dtype=torch.bfloat16, device=device)
        return _seconds(lambda: dist.all_reduce(values, group=group), group, device)

    part = _LARGE // ranks
    step, large = exchange(1), exchange(part)
    tensor, large_tensor = native(hidden), native(_LARGE // BF16_BYTES)
    ring_bytes = 2 * (ranks - 1) * part
    return [
        step,
        max(large - step, 1e-9) / ((ranks - 1) * part),
        tensor,
        max(large_tensor - tensor, 1e-9) / ring_bytes,
    ]


def _codec_seconds(
    codec: Codec, tables: Tables, group: dist.ProcessGroup, device: torch.device
) -> list[float]:
    """Of a call on one token, and of a value: encoded, decoded, finished."""
    ranks, tokens = dist.get_world_size(group), max(_CODEC_VALUES // tables.hidden, 1)
    values = tokens * tables.hidden

    def encode(tokens: int) -> float:
        partial = torch.randn(tokens, tables.hidden, device=device)
        return _seconds(lambda: codec.encode(partial, tables), group, device)

    payload = codec.encode(torch.randn(tokens, tables.hidden, device=device), tables)

    def decode(tokens: int, payloads: int) -> float:
        rows = payload[:tokens].expand(payloads, -1, -1).contiguous()
        return _seconds(lambda: codec.decode_sum(rows, tables), group, device)

    call = encode(1) + decode(1, ranks)
    one, all_ranks = decode(tokens, 1), decode(tokens, ranks)
    added = max(all_ranks - one, 0.0) / max(ranks - 1, 1)
    return [call, encode(tokens) / values, added / values, max(one - added, 0.0) / values]


def _seconds(step: Callable[[], object], group: dist.ProcessGroup, device: torch.device) -> float:
    """Median time of `step`, all ranks at it at once, as they will be."""
    times = []
    for _ in range(_REPEATS + 1):
        dist.barrier(group=group)
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one warms up
