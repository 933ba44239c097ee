"""The cost model's figures for this machine, group and codec, from a short measurement.

It takes half a second on a fast link, up to five on one of 100 Mbit/s. All ranks work at once, as
they will, so what ranks on one machine take from each other is in the figures. They are means over
ranks, the same on every rank.

The bandwidth is that of a stream of chunks like those of a collective, long enough for what happens
once (a token bucket's burst, a scheduler's time slice of 3-4 ms) not to count. Between ranks that
share processors, one small exchange takes 0.3 ms or 4, by chance: the lower quartile is the link's.
The codec's time is the mean: a collective is interrupted as often.
"""

import time
from collections.abc import Callable
from functools import partial as bind
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.benchmark.prediction.cost_model import Costs
from megatron_lowbit.codecs import Codec, Tables
from megatron_lowbit.comm.policy.timings import BF16_BYTES
from megatron_lowbit.comm.transport import CHUNK_VALUES, Channel, Steps, run

_REPEATS = 32
_LONG_REPEATS = 3
# Bytes between two ranks, as in a chunk at 4 bits.
_PART = CHUNK_VALUES // 2
# Seconds that a stream lasts: the burst of an emulated link is 1 ms of its rate.
_STREAM = 0.03
# Of a single chunk, the slowest pair's end counts in full (8 ranks, 100 Mbit/s: 13 % too slow).
_FEWEST_CHUNKS = 2
# On a fast link a stream is shorter: 64 MB a rank at 8 ranks, 0.2 ms over NVLink.
_MOST_CHUNKS = 32
_SLOTS = 3
_CODEC_VALUES = 1 << 20


def probe(codec: Codec, tables: Tables, group: dist.ProcessGroup, device: torch.device) -> Costs:
    """Measure; call it on every rank of `group`.

    Args:
        codec: The same on every rank.
        tables: Of one sync point.
        group: The ranks that will communicate.
        device: Where the partials are.

    Returns:
        The same figures on every rank.
    """
    link = probe_link(group, device)
    figures = _codec_seconds(codec, tables, group, device)
    call, encode, decode, turn = _mean(figures, group, device)
    with_call = link._replace(latency=link.latency + call)
    return Costs(*with_call, encode, decode, turn, per_chunk=link.latency)


class LinkFigures(NamedTuple):
    """What joins the ranks, as our messages and native's see it: what `Costs` begins with.

    In its order and units, but for `latency`: a step's own, without call, encode and decode.
    """

    latency: float
    bandwidth: float
    native_latency: float
    native_bandwidth: float


def probe_link(group: dist.ProcessGroup, device: torch.device) -> LinkFigures:
    """Measure what joins the ranks of `group`; arguments and result as those of `probe`."""
    step, byte, native, native_byte = _mean(_link_seconds(group, device), group, device)
    return LinkFigures(step, 1 / byte, native, 1 / native_byte)


def _link_seconds(group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """Of a small exchange, a byte of a stream, a small native all-reduce, a byte of a long one."""
    ranks = dist.get_world_size(group)

    def exchange(chunks: int, size: int) -> None:
        payload = torch.zeros(ranks, size, dtype=torch.uint8, device=device)
        run(_exchange(Channel(group, i % _SLOTS), payload) for i in range(chunks))

    def native(values: int) -> float:
        tensor = torch.zeros(values, dtype=torch.bfloat16, device=device)
        repeats = _REPEATS if values == ranks else _LONG_REPEATS
        return _seconds(lambda: dist.all_reduce(tensor, group=group), group, device, repeats)

    step = _seconds(lambda: exchange(1, 1), group, device)
    chunks = _stream_chunks(lambda chunks: exchange(chunks, _PART), group, device)
    stream = _seconds(lambda: exchange(chunks, _PART), group, device, _LONG_REPEATS)
    sent = chunks * (ranks - 1) * _PART
    small, long = native(ranks), native(chunks * ranks * _PART // 2 // BF16_BYTES)
    # Of a value a rank: 8 KB take Gloo longer (8 ranks, 2 cores: 25 ms, not 1.5) than they add to
    # 512 KB.
    # A ring sends twice (ranks - 1) / ranks of a tensor: half the stream's size, the same bytes.
    # A small call's time may be mostly chance: it never explains more than half of a long one's.
    return [
        step,
        max(stream - step, stream / 2) / sent,
        small,
        max(long - small, long / 2) / sent,
    ]


def _exchange(channel: Channel, payload: Tensor) -> Steps:
    """The steps of one chunk of a stream: `payload` is ``uint8 [ranks, bytes]``."""
    transfer = channel.exchange(len(payload), payload.shape[1], payload.device)
    yield None
    yield transfer.send(payload)


def _stream_chunks(
    stream: Callable[[int], None], group: dist.ProcessGroup, device: torch.device
) -> int:
    """How many chunks make a stream of `_STREAM` seconds, at most `_MOST_CHUNKS`."""
    chunks = _FEWEST_CHUNKS
    while chunks < _MOST_CHUNKS:
        seconds = _seconds(bind(stream, chunks), group, device, 1)
        if _mean([seconds], group, device)[0] >= _STREAM:
            break
        chunks *= 2
    return chunks


def _codec_seconds(
    codec: Codec, tables: Tables, group: dist.ProcessGroup, device: torch.device
) -> list[float]:
    """Of a call on one token, and of a value: encoded, decoded, finished."""
    ranks, tokens = dist.get_world_size(group), max(_CODEC_VALUES // tables.hidden, 1)
    values = tokens * tables.hidden

    def encode(tokens: int) -> float:
        part = partial[:tokens]
        return _seconds(lambda: codec.encode(part, tables), group, device, mean=True)

    partial = torch.randn(tokens, tables.hidden, device=device).bfloat16()
    payload = codec.encode(partial, tables)

    def decode(tokens: int, payloads: int) -> float:
        rows, out = payload[:tokens].expand(payloads, -1, -1).contiguous(), partial[:tokens]
        return _seconds(lambda: codec.decode_sum(rows, tables, out=out), group, device, mean=True)

    call = encode(1) + decode(1, ranks)
    one, all_ranks = decode(tokens, 1), decode(tokens, ranks)
    added = max(all_ranks - one, 0.0) / max(ranks - 1, 1)
    return [call, encode(tokens) / values, added / values, max(one - added, 0.0) / values]


def _seconds(
    step: Callable[[], object],
    group: dist.ProcessGroup,
    device: torch.device,
    repeats: int = _REPEATS,
    *,
    mean: bool = False,
) -> float:
    """Seconds of `step`, called again and again on all ranks at once: the mean, or else the lower
    quartile, or of few the median."""
    step()  # warms up
    dist.barrier(group=group)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    if mean:
        return sum(times) / repeats
    return sorted(times)[repeats // 4 if repeats > _LONG_REPEATS else repeats // 2]


def _mean(figures: list[float], group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """The means over ranks, with the same bits on all of them."""
    total = torch.tensor(figures, dtype=torch.float32, device=device)
    dist.all_reduce(total, group=group)
    return (total / dist.get_world_size(group)).tolist()
