"""The speeds that the project set itself, measured one after the other by tools/bench_speed.py.

Each target is a ratio of times in one run: of the backend's BF16 all-reduce to ours, or of the time
to first token. A target over several message sizes stands or falls with the worst of them.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_lowbit import cli
from megatron_lowbit.benchmark.collectives import first_token, sweep
from megatron_lowbit.benchmark.collectives.sweep_plan import NATIVE, Plan, Variant, parse_sizes
from megatron_lowbit.codecs import DEFAULT_CODEC
from megatron_lowbit.comm.policy.timings import size_text

_LARGE = parse_sizes("4M,16M,64M")
_ALL = parse_sizes("8K,32K,128K,512K,2M,8M,64M")
_RUNS = 5
# Student's factors of a 95 % interval, by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@dataclass(frozen=True)
class Result:
    """A target and what was measured.

    Attributes:
        work: What was timed.
        asked: The least ratio.
        measured: Ratio by message size, or by way to communicate.
    """

    work: str
    asked: float
    measured: dict[str, float]

    @property
    def worst(self) -> float:
        """What the target is judged by."""
        return min(self.measured.values())

    @property
    def line(self) -> str:
        """A row of a Markdown table."""
        each = ", ".join(f"{name}: {ratio:.2f}" for name, ratio in self.measured.items())
        verdict = "yes" if self.worst >= self.asked else "**no**"
        return f"| {self.work} | {self.asked:.2f}x | {self.worst:.2f}x ({each}) | {verdict} |"


def large_messages(ranks: int, collective: str, asked: float, rows: list[dict]) -> Result:
    """`rotated-hybrid` in 4 bits over 1 Gbit/s links, 4 MB and more."""
    plan = Plan((Variant(DEFAULT_CODEC, collective),), _LARGE, ranks, "1gbit")
    measured = sweep.run(plan, quiet=True).rows
    rows += measured
    work = f"1 Gbit/s, {ranks} ranks, 4 MB and more, {collective}"
    return Result(work, asked, _speedups(measured, collective))


def auto(ranks: int, link: str | None, rows: list[dict]) -> "AutoRuns":
    """`auto`, which times the collectives when it starts, against native: several runs, each with
    processes and times of its own. Errors are carried, as in models."""
    # Often both are native. Many calls: a short one takes 0.3 ms, or 4 where a rank waits for the
    # other's time slice.
    variants = (NATIVE, Variant(DEFAULT_CODEC, "auto"))
    plan = Plan(variants, _ALL, ranks, link, seconds=1.0, call_by_call=True, feedback=True)
    runs = AutoRuns(f"auto, {ranks} ranks, {link or 'loopback'}", {})
    for _ in range(_RUNS):
        measured = sweep.run(plan, quiet=True)
        rows += measured.rows
        ratios = _speedups(measured.rows, "auto")
        for _, size, collective in measured.choices:
            taken = runs.by_size.setdefault(size_text(size), [])
            taken.append((collective, ratios[size_text(size)]))
    return runs


@dataclass(frozen=True)
class AutoRuns:
    """Several runs of `auto` at one setting.

    Attributes:
        work: The setting.
        by_size: What each run took, and native's time over its time.
    """

    work: str
    by_size: dict[str, list[tuple[str, float]]]

    def result(self) -> Result | None:
        """The lower ends of the 95 % intervals where low bits were taken; None if nowhere."""
        ends = {}
        for size, taken in self.by_size.items():
            low = [ratio for collective, ratio in taken if collective != "native"]
            if low:
                ends[f"{size}, {len(low)} of {len(taken)} runs"] = lower_end(low)
        return Result(f"{self.work}, low bits, lower end", 1.0, ends) if ends else None

    @property
    def line(self) -> str:
        """A row of a Markdown table: what was taken how often, with the mean ratio."""
        cells = []
        for taken in self.by_size.values():
            parts = []
            for name in dict.fromkeys(collective for collective, _ in taken):
                mine = [ratio for collective, ratio in taken if collective == name]
                parts.append(f"{statistics.mean(mine):.2f}x {name} ({len(mine)})")
            cells.append(", ".join(parts))
        return f"| {self.work} | {' | '.join(cells)} |"


def lower_end(ratios: list[float]) -> float:
    """Of Student's 95 % interval of the mean; a single ratio stands for itself."""
    if len(ratios) < 2:
        return ratios[0]
    half = _STUDENT[len(ratios) - 1] * statistics.stdev(ratios) / len(ratios) ** 0.5
    return statistics.mean(ratios) - half


def auto_table(rows: list[dict]) -> None:
    """Measure `auto` at every setting, and print what it took and what that gave."""
    settings: list[tuple[int, str | None]] = [(2, None), (4, None), (2, "1gbit"), (4, "1gbit")]
    runs = []
    for ranks, link in settings:
        runs.append(auto(ranks, link, rows))
        result = runs[-1].result()
        cli.say(result.line if result else f"| {runs[-1].work} | 1.00x | all native | yes |")
    sizes = " | ".join(runs[0].by_size)
    head = f"\n| native's time over auto's, mean (runs) | {sizes} |\n" + "| --- " * (len(_ALL) + 1)
    cli.say("\n".join([f"{head}|", *(run.line for run in runs)]))


def first_token_result(checkpoint: Path, text: Path, ranks: int) -> tuple[Result, list[str]]:
    """Time to first token behind 100 Mbit/s, and a line for each way to communicate."""
    rows = first_token.run(checkpoint, text, ranks=ranks, link="100mbit")
    lines = [
        f"| {row['way']} | {row['ttft_ms']:.0f} ms | {row['speedup']:.2f}x | "
        f"{row['communication_ms']:.0f} ms, {row['communication_ms'] / row['ttft_ms']:.0%} | "
        f"{row['sent_bytes'] / 1e6:.1f} MB |"
        for row in rows
    ]
    best = max(rows, key=lambda row: row["speedup"])
    work = f"time to first token, {rows[0]['tokens']} tokens, TP {ranks}, 100 Mbit/s"
    return Result(work, 2.0, {best["way"]: best["speedup"]}), lines


def run(checkpoint: Path, text: Path) -> list[dict]:
    """Measure all targets and print them as they come; the rows of all sweeps."""
    rows: list[dict] = []
    cli.say("| work | goal | measured | reached |\n| --- | --- | --- | --- |")
    steps: list[Callable[[], Result]] = [
        lambda: large_messages(4, "two-shot", 3.0, rows),
        lambda: large_messages(8, "two-shot", 2.8, rows),
        lambda: large_messages(2, "one-shot", 3.0, rows),
    ]
    for step in steps:
        cli.say(step().line)
    result, lines = first_token_result(checkpoint, text, 3)
    cli.say(result.line)
    auto_table(rows)
    head = (
        "| way | TTFT | speedup | in collectives, share | sent by a rank |\n" + "| --- " * 5 + "|"
    )
    cli.say("\n".join(["", head, *lines]))
    return rows


def _speedups(rows: list[dict], collective: str) -> dict[str, float]:
    return {
        size_text(row["bytes"]): row["speedup"] for row in rows if row["collective"] == collective
    }
