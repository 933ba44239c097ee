"""The speeds that the project set itself, measured one after the other by tools/bench_speed.py.

Each target is a ratio of times in one run: of the backend's BF16 all-reduce to ours, or of the time
to first token. A target over several message sizes stands or falls with the worst of them.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_lowbit import cli
from megatron_lowbit.benchmark.collectives import first_token, sweep, sweep_report
from megatron_lowbit.benchmark.collectives.sweep_plan import NATIVE, Plan, Variant, parse_sizes
from megatron_lowbit.codecs import DEFAULT_CODEC
from megatron_lowbit.comm.policy.tuning import write_tuning

_LARGE = parse_sizes("4M,16M,64M")
_ALL = parse_sizes("8K,32K,128K,512K,2M,8M,64M")
_TUNED = ("one-shot", "two-shot", "reduce-scatter")


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


def auto(ranks: int, link: str | None, rows: list[dict]) -> Result:
    """`auto`, by a tuning file made just before, against native at every size."""
    variants = tuple(Variant(DEFAULT_CODEC, collective) for collective in _TUNED)
    tuned = sweep.run(Plan(variants, _ALL, ranks, link), quiet=True)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tuning.json"
        write_tuning(sweep_report.tuning(tuned), path)
        # Often both are native. Many calls: a short one takes 0.3 ms, or 4 where a rank waits for
        # the other's time slice.
        variants = (NATIVE, Variant(DEFAULT_CODEC, "auto"))
        plan = Plan(variants, _ALL, ranks, link, tuning=path, seconds=5.0, call_by_call=True)
        measured = sweep.run(plan, quiet=True)
    rows += tuned.rows + measured.rows
    taken = {sweep_report.size_text(size): collective for _, size, collective in measured.choices}
    ratios = {
        f"{size} by {taken[size]}": ratio
        for size, ratio in _speedups(measured.rows, "auto").items()
    }
    return Result(f"auto, {ranks} ranks, {link or 'loopback'}, 8 KB to 64 MB", 0.95, ratios)


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
        lambda: auto(2, None, rows),
        lambda: auto(4, None, rows),
        lambda: auto(4, "1gbit", rows),
    ]
    for step in steps:
        cli.say(step().line)
    result, lines = first_token_result(checkpoint, text, 3)
    cli.say(result.line)
    head = (
        "| way | TTFT | speedup | in collectives, share | sent by a rank |\n" + "| --- " * 5 + "|"
    )
    cli.say("\n".join(["", head, *lines]))
    return rows


def _speedups(rows: list[dict], collective: str) -> dict[str, float]:
    return {
        sweep_report.size_text(row["bytes"]): row["speedup"]
        for row in rows
        if row["collective"] == collective
    }
