"""The cost model against emulated links: predicted and measured in the same process group.

The ranks take their figures by `benchmark.prediction.probe` and then time real collectives: calls
one after the other without barriers, the median of `_REPEATS` on each rank, the mean over ranks.

Judged are cases that are predicted to take `SHORTEST` or longer, where bytes and work are the
cost. Shorter ones are measured and shown: on processors that ranks share, one of them waits for a
time slice of 3-4 ms or does not, by chance, and no formula says which. A group of cases with one
that is off is probed and measured again, at most `ATTEMPTS` times in all: others on the machine
take processor time now and then, a wrong formula is wrong each time.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lowbit.benchmark.collectives.links import emulated_links, parse_rate
from megatron_lowbit.benchmark.prediction.cost_model import FORMULAS, Message
from megatron_lowbit.benchmark.prediction.probe import probe
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.comm import all_reduce
from megatron_lowbit.comm.policy.timings import BF16_BYTES
from megatron_lowbit.files import import_path

TOLERANCE = 0.25
SHORTEST = 0.010
ATTEMPTS = 3
COLLECTIVES = ("native", "one-shot", "two-shot")
_SIZES = (512 << 10, 4 << 20, 16 << 20)
# 8 ranks at 100 Mbit/s take 2.5 s for 16 MB: left out, so that the check takes less than 2 minutes.
CASES = (
    ("1gbit", 2, _SIZES),
    ("1gbit", 4, _SIZES),
    ("100mbit", 2, _SIZES),
    ("100mbit", 4, _SIZES),
    ("100mbit", 8, _SIZES[:2]),
)
_HIDDEN = 4096
_REPEATS = 7


@dataclass(frozen=True)
class Result:
    """One case: rate and ranks of the link, bytes of BF16, collective, seconds."""

    rate: str
    ranks: int
    size: int
    collective: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """How far the prediction is off, of the measured time."""
        return self.predicted / self.measured - 1

    @property
    def judged(self) -> bool:
        """Whether the model claims to describe the case."""
        return self.predicted >= SHORTEST

    @property
    def ok(self) -> bool:
        """Whether the prediction is near enough, or not judged."""
        return not self.judged or abs(self.error) <= TOLERANCE


def measure(rate: str, ranks: int, sizes: Sequence[int]) -> list[Result]:
    """Predict and measure all collectives behind emulated links, at `sizes` in bytes of BF16.

    Raises:
        LowbitError: Links cannot be emulated here, or a rank failed.
    """
    with tempfile.TemporaryDirectory() as directory, emulated_links(ranks, parse_rate(rate)) as on:
        output = Path(directory) / "results.json"
        argv = [sys.executable, "-m", __name__, str(output), *map(str, sizes)]
        on.run(argv, env={"PYTHONPATH": import_path()})
        return [Result(rate, ranks, **row) for row in json.loads(output.read_text())]


def _rank_main() -> None:
    """One rank: rank 0 writes the rows."""
    output, *sizes = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        rows = _rows([int(size) for size in sizes])
        if dist.get_rank() == 0:
            Path(output).write_text(json.dumps(rows))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _rows(sizes: Sequence[int]) -> list[dict]:
    codec = get_codec()
    kept = torch.arange(codec.default_bf16_features(_HIDDEN))
    tables = codec.tables(_HIDDEN, bf16_index=kept)
    group, row = dist.group.WORLD, codec.row_bytes(tables) / _HIDDEN
    assert group is not None, "the ranks have started it"
    costs = probe(codec, tables, group, torch.device("cpu"))
    rows = []
    for size in sizes:
        x = torch.randn(size // BF16_BYTES // _HIDDEN, _HIDDEN).bfloat16()
        message = Message(x.numel(), dist.get_world_size(), row, row)
        for name in COLLECTIVES:
            predicted = FORMULAS[name](message, costs)

            def call(x=x, name=name):
                all_reduce(x, codec=codec, tables=tables, collective=name)

            measured = _measured(call, 5 if predicted > 0.5 else _REPEATS)
            found = {"predicted": predicted, "measured": measured}
            rows.append({"size": size, "collective": name} | found)
    return rows


def _measured(call, repeats: int) -> float:
    """Seconds of a call: the median, and the mean of it over ranks."""
    times = []
    dist.barrier()
    for _ in range(1 + repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    total = torch.tensor(statistics.median(times[1:]), dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


if __name__ == "__main__":
    _rank_main()
