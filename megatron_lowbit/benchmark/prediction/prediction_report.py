"""Predictions as text: a summary for each link, details of a few cases, the check."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from megatron_lowbit.benchmark.prediction.hardware import LAUNCH, LINKS, MEMORY_SHARE, NODE_SIZE
from megatron_lowbit.benchmark.prediction.prediction import BATCHES, COLLECTIVES, PROMPTS, Row
from megatron_lowbit.benchmark.prediction.prediction_check import SHORTEST, Result
from megatron_lowbit.text_table import aligned

_SHORT = {"hierarchical": "hier.", "hierarchical-low": "hier.-low"}


def preamble(bits: tuple[int, int]) -> str:
    """What the figures are, and what they assume."""
    share, launch = f"{MEMORY_SHARE:.0%}", f"{LAUNCH * 1e6:.0f} us"
    return (
        f"Predicted, not measured: time of tensor-parallel communication, {bits[0]}+{bits[1]} "
        "bits (partial + sum);\n"
        "a step of decode (batch N), a token of prefill (Nk tokens).\n"
        f"Assumed: codec kernels at {share} of the card's memory bandwidth and {launch} each; "
        "nothing overlaps with the model's work.\n"
        "x: native BF16's time over that of the fastest; native: no other saves a tenth of it.\n"
        f"hier.: BF16 inside nodes of {NODE_SIZE}, low bits between; hier.-low: low bits in both.\n"
        "Sources [D], [N] and all assumptions: megatron_lowbit/benchmark/prediction/hardware.py."
    )


def heading(link: str) -> str:
    """A link's figures and their sources."""
    found = LINKS[link]
    text = f"{link}: {found.bandwidth / 1e9:g} GB/s each way ({found.source}); {found.card.name}"
    if found.inside is None:
        return f"{text}; one node, up to {NODE_SIZE} ranks"
    nics = f"{found.nics} NIC{'s' if found.nics > 1 else ''}"
    return (
        f"{text}\n  TP up to {NODE_SIZE}: a rank a node; more: nodes of {NODE_SIZE}, "
        f"{found.inside} inside, {nics} a node"
    )


def summary(rows: Iterable[Row]) -> str:
    """The best collective and its speedup: a table a link, a line a model and TP size."""
    passes = [f"batch {n}" for n in BATCHES] + [f"{n >> 10}k tokens" for n in PROMPTS]
    parts = []
    for link, of_link in groupby(rows, key=lambda row: row.link):
        lines = [["model", "TP", *passes]]
        for (model, tp), cells in groupby(of_link, key=lambda row: (row.model, row.tp)):
            lines.append([model, str(tp), *map(_cell, cells)])
        parts.append(_table(link, lines, left=len(lines[0])))
    return "\n\n".join(parts)


def details(rows: Iterable[Row]) -> str:
    """Times of every collective: a table a link, a line a model, TP size and pass."""
    parts = []
    for link, group in groupby(rows, key=lambda row: row.link):
        of_link = list(group)
        names = [name for name in COLLECTIVES if any(name in row.seconds for row in of_link)]
        head = ["model", "TP", "pass", "message", *map(_short, names), "best", "native", "best"]
        lines = [head, *(_detail(row, names) for row in of_link)]
        parts.append(_table(link, lines, left=3, note="us: one all-reduce | a step or token"))
    return "\n\n".join(parts)


def _table(link: str, rows: Sequence[Sequence[str]], *, left: int, note: str = "") -> str:
    """Of one link, under its heading; `note` ends where the rows do."""
    lines = [line.rstrip() for line in aligned(rows, left=left)]
    above = [f"{note:>{len(lines[0])}}"] if note else []
    return "\n".join([heading(link), *above, *lines])


def check_heading() -> str:
    """What is above the lines of `checked`."""
    left = f"{'link':<9}{'ranks':>5}  {'message':>8}  {'collective':<11}"
    return f"{left}{'predicted':>11}{'measured':>11}{'error':>8}"


def checked(results: Sequence[Result]) -> str:
    """A line a case of the check."""
    lines = []
    for one in results:
        times = f"{one.predicted * 1e3:>8.1f} ms{one.measured * 1e3:>8.1f} ms"
        note = "" if one.judged else f"  below {SHORTEST * 1e3:.0f} ms: not judged"
        lines.append(
            f"{one.rate:<9}{one.ranks:>5}  {size(one.size):>8}  {one.collective:<11}{times}"
            f"{one.error:>+8.0%}{note if one.ok else '  OFF'}"
        )
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes in words."""
    for shift, unit in ((30, "GB"), (20, "MB"), (10, "KB")):
        if count >= 1 << shift:
            return f"{count >> shift} {unit}"
    return f"{count} B"


def _cell(row: Row) -> str:
    return "native" if row.best == "native" else f"{_short(row.best)} {row.speedup:.1f}x"


def _detail(row: Row, names: Sequence[str]) -> list[str]:
    times = [f"{row.seconds[n] * 1e6:.0f}" if n in row.seconds else "" for n in names]
    tokens = f"batch {row.tokens}" if row.phase == "decode" else f"{row.tokens >> 10}k"
    whole = [f"{row.token_seconds(name) * 1e6:.1f}" for name in ("native", row.best)]
    where = [row.model, str(row.tp), f"{row.phase} {tokens}", size(row.message_bytes)]
    return [*where, *times, _cell(row), *whole]


def _short(name: str) -> str:
    return _SHORT.get(name, name)
