"""The doctor's advice behind emulated links, held against sweeps of the same messages.

At each setting the ranks are examined as torchrun's would be, without a model. Before and after
that, sweeps time every collective at the same messages, with carries, in passes of 96 calls with
computing in between, as in a model. Each sweep has processes of its own: ranks that share cores
fall into step or out of it, and stay there, so what one process measures again and again need not
be what the next one measures.

Low bits that it takes are *right* where they are slower than native in no sweep, *wrong* where they
are in all, and else *unclear*: sweeps contradict each other. Native that it keeps is *right* where
no low bits gain more than the margin that `auto` asks for in any sweep. Else it is *open* where the
doctor says that these may, *missed* where one collective gains that in all sweeps, or *unclear*.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_lowbit import cli
from megatron_lowbit.benchmark.collectives import sweep
from megatron_lowbit.benchmark.collectives.links import emulated_links, parse_rate
from megatron_lowbit.benchmark.collectives.ranks import plain_ranks
from megatron_lowbit.benchmark.collectives.sweep_plan import Plan, Variant
from megatron_lowbit.benchmark.doctor.doctor_advice import DECODE, PREFILL, unsure
from megatron_lowbit.benchmark.doctor.doctor_run import BITS, HIDDEN, examine_links
from megatron_lowbit.codecs import DEFAULT_CODEC
from megatron_lowbit.comm.policy.timings import BF16_BYTES, MARGIN, NATIVE, size_text
from megatron_lowbit.files import import_path

SETTINGS: tuple[tuple[str | None, int], ...] = tuple(
    (link, ranks) for link in ("100mbit", "1gbit", "2.5gbit", None) for ranks in (2, 4)
)
_LONGEST = 1024  # tokens: 8 MB take native 1 s at 100 Mbit/s and 4 ranks
_SIZES = tuple(BF16_BYTES * HIDDEN * tokens for tokens in DECODE + PREFILL if tokens <= _LONGEST)
_BEFORE, _AFTER = 1, 2  # sweeps
_SECONDS = 2.0  # of a sweep for each size and case
_COLLECTIVES = ("one-shot", "two-shot")
_WORDS = ("right", "open", "unclear", "missed", "wrong")
_LEAST_GAIN = 1 / (1 - MARGIN)


@dataclass(frozen=True)
class Verdict:
    """Advice on one message.

    Attributes:
        link: Its rate, or ``loopback``.
        size: Bytes of the message in BF16.
        taken: What the doctor says `auto` takes.
        perhaps: What it says is perhaps faster, and what that takes of native's time then.
        speedups: By collective: what each sweep measured, over native.
    """

    ranks: int
    link: str
    bits: int
    size: int
    taken: str
    perhaps: dict[str, float]
    speedups: dict[str, list[float]]

    @property
    def word(self) -> str:
        """One of `_WORDS`."""
        if self.taken != NATIVE:
            measured = self.speedups[self.taken]
            return _said(all(x >= 1 for x in measured), all(x < 1 for x in measured), "wrong")
        gains = {name: [x > _LEAST_GAIN for x in each] for name, each in self.speedups.items()}
        if any(any(gains[name]) for name in self.perhaps):
            return "open"
        return _said(not any(map(any, gains.values())), any(map(all, gains.values())), "missed")

    @property
    def line(self) -> str:
        """A row of a Markdown table."""
        measured = " | ".join(map(_span, (self.speedups[name] for name in _COLLECTIVES)))
        what = f"{self.link}, {self.ranks} ranks, {self.bits} bits, {size_text(self.size)}"
        taken = f"{self.taken} ({unsure(self.perhaps)})" if self.perhaps else self.taken
        return f"| {what} | {taken} | {measured} | {self.word} |"


def _said(is_right: bool, is_false: bool, false: str) -> str:
    """What all sweeps say, or that they contradict each other."""
    if is_right:
        return "right"
    return false if is_false else "unclear"


def _span(speedups: list[float]) -> str:
    return f"{min(speedups):.2f}x to {max(speedups):.2f}x"


def run(seconds: float) -> None:
    """Try all settings, the doctor with `seconds` each, and print what it and the sweeps found."""
    found: list[Verdict] = []
    for link, ranks in SETTINGS:
        found += try_out(link, ranks, seconds)
    cli.say("\n| message | the doctor takes | sweeps: one-shot | two-shot | advice |")
    cli.say("| --- " * 5 + "|\n" + "\n".join(one.line for one in found))
    words = [one.word for one in found]
    counts = ", ".join(f"{words.count(word)} {word}" for word in _WORDS)
    cli.say(f"\n{len(found)} cases: {counts}")


def try_out(link: str | None, ranks: int, seconds: float) -> list[Verdict]:
    """Sweep and examine at one rate (`parse_rate`), or on loopback without one.

    Raises:
        LowbitError: Links cannot be emulated here, or a rank failed.
    """
    cli.say(f"\n{link or 'loopback'}, {ranks} ranks")
    sweeps = [_sweep(link, ranks) for _ in range(_BEFORE)]
    examined = _examine(link, ranks, seconds)
    sweeps += [_sweep(link, ranks) for _ in range(_AFTER)]
    return list(_verdicts(link, ranks, examined, sweeps))


def _sweep(link: str | None, ranks: int) -> list[dict]:
    """Rows of a sweep by all collectives."""
    low = tuple(Variant(f"{DEFAULT_CODEC}-{bits}", by) for bits in BITS for by in _COLLECTIVES)
    plan = Plan(
        low,
        _SIZES,
        ranks,
        link,
        hidden=HIDDEN,
        feedback=True,
        seconds=_SECONDS,
        in_passes=True,
    )
    return sweep.run(plan, quiet=True).rows


def _examine(link: str | None, ranks: int, seconds: float) -> dict[str, list]:
    """What the doctor takes and what may be faster, by ``bits size``."""
    started = emulated_links(ranks, parse_rate(link)) if link else plain_ranks(ranks)
    with tempfile.TemporaryDirectory(prefix="lowbit-doctor-") as directory, started as group:
        out = Path(directory) / "examined.json"
        argv = [sys.executable, "-m", __name__, str(out), str(seconds)]
        group.run(argv, env={"PYTHONPATH": import_path()})
        return json.loads(out.read_text())


def _rank_main() -> None:
    """One rank: rank 0 writes what came out."""
    out, seconds = Path(sys.argv[1]), float(sys.argv[2])
    with sweep.process_group() as device:
        assert dist.group.WORLD is not None, "it was started"
        examined = examine_links(dist.group.WORLD, device, seconds)
        if dist.get_rank() == 0:
            said = {
                f"{bits} {one.size}": [one.taken, one.perhaps]
                for bits, passes in examined.items()
                for one in passes
            }
            out.write_text(json.dumps(said))
        dist.barrier()


def _verdicts(
    link: str | None, ranks: int, examined: dict[str, list], sweeps: list[list[dict]]
) -> Iterator[Verdict]:
    for bits in BITS:
        for size in _SIZES:
            mine = {
                name: [
                    row["speedup"]
                    for rows in sweeps
                    for row in rows
                    if (row["bytes"], row["collective"]) == (size, name)
                    and f"({bits} bits)" in row["codec"]
                ]
                for name in _COLLECTIVES
            }
            taken, perhaps = examined[f"{bits} {size}"]
            yield Verdict(ranks, link or "loopback", bits, size, taken, perhaps, mine)


if __name__ == "__main__":
    cli.run(_rank_main)
