"""The doctor's advice behind emulated links, held against a sweep in the same processes.

At each setting the ranks are examined as torchrun's would be, without a model, and then every
collective is timed at the same messages, with carries, by the sweep, in passes of 96 calls with
computing in between, as in a model. Advice is *right* where low bits that it takes are not slower
than native in the sweep, and where native that it keeps is not slower than low bits by more than
the margin that `auto` asks for. It is *wrong* where low bits are slower, and *missed* where they
would have been faster; *open* where the doctor says so itself: that low bits are perhaps faster,
and more seconds may tell.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_lowbit import cli
from megatron_lowbit.benchmark.collectives import sweep
from megatron_lowbit.benchmark.collectives.links import emulated_links, parse_rate
from megatron_lowbit.benchmark.collectives.ranks import plain_ranks
from megatron_lowbit.benchmark.collectives.sweep_plan import Plan, Variant
from megatron_lowbit.benchmark.doctor.doctor_advice import Pass
from megatron_lowbit.benchmark.doctor.doctor_run import BITS, HIDDEN, examine_links
from megatron_lowbit.codecs import DEFAULT_CODEC
from megatron_lowbit.comm.policy.timings import MARGIN, NATIVE, size_text
from megatron_lowbit.files import import_path

SETTINGS: tuple[tuple[str | None, int], ...] = tuple(
    (link, ranks) for link in ("100mbit", "1gbit", None) for ranks in (2, 4)
)
_LONGEST = 1024  # tokens: 8 MB take native 1 s at 100 Mbit/s and 4 ranks
_SECONDS = 3.0  # of the sweep for each size and case
_COLLECTIVES = ("one-shot", "two-shot")
_WORDS = ("right", "open", "missed", "wrong")


@dataclass(frozen=True)
class Verdict:
    """Advice on one message.

    Attributes:
        link: Its rate, or ``loopback``.
        size: Bytes of the message in BF16.
        taken: What the doctor says `auto` takes.
        unsure: What it says is perhaps faster; empty if nothing.
        speedups: By collective: what the sweep measured, over native.
    """

    ranks: int
    link: str
    bits: int
    size: int
    taken: str
    unsure: str
    speedups: dict[str, float]

    @property
    def word(self) -> str:
        """``right``, ``wrong``, ``missed`` or ``open``."""
        if self.taken != NATIVE:
            return "right" if self.speedups[self.taken] >= 1 else "wrong"
        if max(self.speedups.values()) <= 1 / (1 - MARGIN):
            return "right"
        return "open" if self.unsure else "missed"

    @property
    def line(self) -> str:
        """A row of a Markdown table."""
        measured = " | ".join(f"{self.speedups[name]:.2f}x" for name in _COLLECTIVES)
        what = f"{self.link}, {self.ranks} ranks, {self.bits} bits, {size_text(self.size)}"
        taken = f"{self.taken} ({self.unsure})" if self.unsure else self.taken
        return f"| {what} | {taken} | {measured} | {self.word} |"


def run(seconds: float) -> None:
    """Try all settings, the doctor with `seconds` each, and print what it and the sweep found."""
    found: list[Verdict] = []
    for link, ranks in SETTINGS:
        found += try_out(link, ranks, seconds)
    cli.say("\n| message | the doctor takes | sweep: one-shot | two-shot | advice |")
    cli.say("| --- " * 5 + "|\n" + "\n".join(one.line for one in found))
    words = [one.word for one in found]
    counts = ", ".join(f"{words.count(word)} {word}" for word in _WORDS)
    cli.say(f"\n{len(found)} cases: {counts}")


def try_out(link: str | None, ranks: int, seconds: float) -> list[Verdict]:
    """Examine and sweep at one rate (`parse_rate`), or on loopback without one.

    Raises:
        LowbitError: Links cannot be emulated here, or a rank failed.
    """
    started = emulated_links(ranks, parse_rate(link)) if link else plain_ranks(ranks)
    with tempfile.TemporaryDirectory(prefix="lowbit-doctor-") as directory, started as group:
        out = Path(directory) / "verdicts.json"
        cli.say(f"\n{link or 'loopback'}, {ranks} ranks")
        argv = [sys.executable, "-m", __name__, str(out), link or "loopback", str(seconds)]
        group.run(argv, env={"PYTHONPATH": import_path()})
        return [Verdict(**one) for one in json.loads(out.read_text())]


def _rank_main() -> None:
    """One rank: rank 0 writes what came out."""
    out, link, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    with sweep.process_group() as device:
        assert dist.group.WORLD is not None, "it was started"
        examined = examine_links(dist.group.WORLD, device, seconds)
        sizes = tuple(sorted({one.size for one in examined[BITS[0]] if one.tokens <= _LONGEST}))
        variants = tuple(
            Variant(f"{DEFAULT_CODEC}-{bits}", by) for bits in BITS for by in _COLLECTIVES
        )
        plan = Plan(
            variants, sizes, None, hidden=HIDDEN, feedback=True, seconds=_SECONDS, in_passes=True
        )
        rows = sweep.measure(plan, device=device, quiet=True).rows
        verdicts = list(_verdicts(examined, rows, link))
        if dist.get_rank() == 0:
            out.write_text(json.dumps([asdict(one) for one in verdicts]))
        dist.barrier()


def _verdicts(examined: dict[int, list[Pass]], rows: list[dict], link: str) -> Iterator[Verdict]:
    for bits, passes in examined.items():
        said = {one.size: (one.taken, one.unsure) for one in passes}
        for size in sorted({row["bytes"] for row in rows}):
            mine = {
                row["collective"]: row["speedup"]
                for row in rows
                if row["bytes"] == size and f"({bits} bits)" in row["codec"]
            }
            yield Verdict(dist.get_world_size(), link, bits, size, *said[size], mine)


if __name__ == "__main__":
    cli.run(_rank_main)
