"""What a CPU could not decide: each setting timed at 4096 x 8192, and the best of them.

Warps of a program, with either rotation. How many tokens of a two-shot all-reduce make a chunk: its
steps on one rank, without what is sent between them. A program has one row in every kernel that is
measured, so rows a program are no setting.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from megatron_lowbit.benchmark.codecs.codec_cases import (
    Case,
    cases,
    check_rotated,
    make_partials,
    make_tables,
)
from megatron_lowbit.benchmark.gpu_check.stage_tasks import Row, Rows, Task
from megatron_lowbit.benchmark.gpu_check.work import attempts
from megatron_lowbit.benchmark.gpu_check.work.bit_stage import HIDDEN, MEASURED, RANKS, WARPS
from megatron_lowbit.benchmark.gpu_check.work.interpreted import interpret
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import with_warps
from megatron_lowbit.benchmark.timing import time_alone
from megatron_lowbit.codecs import Codec, Tables, parse_codec
from megatron_lowbit.comm.transport import CHUNK_VALUES
from megatron_lowbit.kernels import switches

_TOKENS, _SECONDS = 4096, 0.05
_TRIED = (
    *("encode", "decode_sum of {ranks}", "reduce_encode of {ranks}"),
    *("encode with a carry", "reduce_encode of {ranks} with a carry"),
)
_CHUNKS = (1, 2, 4, 8)  # times CHUNK_VALUES


def run(task: Task) -> Rows:
    """A row for each setting, and behind those of an operation one for its best."""
    shape, ranks, seconds = (_TOKENS, HIDDEN), RANKS, _SECONDS
    warps: tuple[int, ...] = WARPS
    if task.is_rehearsal:
        interpret()
        shape, ranks, warps, seconds = (2, 64), 2, WARPS[:1], 0.001
    device = torch.device(task.device)
    codec, partials = parse_codec(MEASURED[1]), make_partials(shape, ranks, device)
    trial = _Trial(codec, make_tables(codec, partials), partials, device, seconds)
    for settings in _operations(trial, warps):
        found = []
        for row in attempts.attempts(settings, device):
            found.append(row)
            yield row
        timed = [row for row in found if "median_ms" in row]
        if timed:
            yield {"best": min(timed, key=lambda row: row["median_ms"])}


def _operations(trial: "_Trial", warps: tuple[int, ...]) -> Iterator[list[attempts.Case]]:
    """The settings of each operation."""
    found = {case.name: case for case in cases(trial.codec, trial.tables, trial.partials)}
    for name in (name.format(ranks=len(trial.partials)) for name in _TRIED):
        ways = switches.ROTATIONS if found[name].rotates else (switches.BUTTERFLIES,)
        yield [
            (f"{name}, {way}, {count} warps", partial(trial.timed, found[name], way, count))
            for way in ways
            for count in warps
        ]
    yield [(f"two-shot, chunks of {n}", partial(trial.chunked, n)) for n in _CHUNKS]


class _Trial:
    """The codec, its inputs, and how long to measure."""

    def __init__(self, codec: Codec, tables: Tables, partials: list, device, seconds: float):
        self.codec, self.tables, self.partials = codec, tables, partials
        self._device, self._seconds = device, seconds

    def timed(self, case: Case, way: str, warps: int) -> Row:
        """One operation with a setting, checked against the default setting."""
        expected = tuple(result.clone() for result in case.call(*case.given))
        with switches.rotating_by(way), with_warps(warps):
            got = case.call(*case.given)
            inputs = self.codec, self.tables, self.partials
            check_rotated(way, got, expected, *inputs, case.name)
            took = self._median(lambda: case.call(*case.given))
        return {"operation": case.name, "rotation": way, "warps": warps, "median_ms": took}

    def chunked(self, factor: int) -> Row:
        """The steps of two-shot on one rank, chunk by chunk."""
        ranks, (tokens, hidden) = len(self.partials), self.partials[0].shape
        chunk = min(max(factor * CHUNK_VALUES * ranks // hidden, ranks), tokens)
        payloads = torch.stack([self.codec.encode(x, self.tables) for x in self.partials])
        codec, tables, partial_ = self.codec, self.tables, self.partials[0]
        sum_codec, sum_tables = codec.for_sum(), codec.sum_tables(tables)
        out = torch.empty_like(partial_)

        def steps() -> None:
            for start in range(0, tokens, chunk):
                rows = slice(start, start + chunk)
                sums = codec.encode(partial_[rows], tables)  # as many rows as all owners send back
                mine = payloads[:, start : start + -(-chunk // ranks)]
                codec.reduce_encode(mine, tables)
                sum_codec.decode_sum(sums[None], sum_tables, out=out[rows])

        took = self._median(steps)
        return {"operation": "two-shot", "chunk_values": chunk * hidden // ranks, "median_ms": took}

    def _median(self, call: Callable[[], object]) -> float:
        [times] = time_alone([call], seconds=self._seconds, device=self._device)
        return round(times.median, 5)
