"""What a sweep's rows say: a table, the cases that lose, the JSON and its sidecar.

All take the rows of `sweep.Measured`, of one sweep or of several put together.
"""

import json
import os
import platform
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from megatron_lowbit import __version__
from megatron_lowbit.benchmark.collectives.sweep import Measured
from megatron_lowbit.benchmark.collectives.sweep_plan import SCATTERS
from megatron_lowbit.comm.policy.timings import size_text
from megatron_lowbit.files import check_output, commit, write_atomic
from megatron_lowbit.text_table import aligned

Row = dict
# `auto` may cost this much of native's time where it takes native: scatter of the measurement.
AUTO_FLOOR = 0.95
# p90 / p10 of a case: above it, single calls wait for other work on the cores.
UNSTEADY = 3


def tables(rows: list[Row]) -> str:
    """A table per number of ranks and link: sizes down, speedups of the variants across.

    The scatters, whose rival is the backend's reduce-scatter, have tables of their own.
    """
    parts = []
    for (ranks, link), group in _by_setting(rows).items():
        for scatter, what in ((False, "all-reduce"), (True, "reduce-scatter")):
            mine = [row for row in group if (row["collective"] in SCATTERS) == scatter]
            if mine:
                head = f"{what}, {ranks} ranks, {link}: speedup against native BF16"
                parts.append("\n".join([head, *_table(mine)]))
    return "\n\n".join(parts)


def losses(rows: list[Row]) -> list[str]:
    """The low-bit cases that are slower than native, a line for each variant and setting.

    `auto` has a little tolerance.
    """
    found: dict[str, list[str]] = {}
    for row in rows:
        floor = AUTO_FLOOR if row["collective"] == "auto" else 1.0
        if not _is_native(row) and row["speedup"] < floor:
            case = f"{row['ranks']} ranks, {row['link']}, {variant_name(row)}"
            text = f"{row['speedup']:.2f}x at {size_text(row['bytes'])}"
            found.setdefault(case, []).append(text)
    return [f"{case}: {', '.join(sizes)}" for case, sizes in found.items()]


def unsteady(rows: list[Row]) -> str:
    """A warning if many cases scatter, as on a machine that is busy with other work; else empty."""
    bad = sum(row["p90_ms"] > UNSTEADY * row["p10_ms"] for row in rows)
    if 4 * bad <= len(rows):
        return ""
    return (
        f"unsteady: p90 is above {UNSTEADY} times p10 in {bad} of {len(rows)} cases; is the "
        "machine busy with other work?"
    )


def choices(measured: Measured) -> list[str]:
    """What `auto` took at which size, a line for each codec."""
    by_codec: dict[str, list[str]] = {}
    for codec, size, collective in measured.choices:
        by_codec.setdefault(codec, []).append(f"{collective} at {size_text(size)}")
    return [f"auto of {codec} took {', '.join(taken)}" for codec, taken in by_codec.items()]


def write(rows: list[Row], path: Path, meta: dict) -> None:
    """Write the rows as JSON to `path`, and `meta` beside it as ``.meta.json``."""
    write_atomic(path, json.dumps(rows, indent=1).encode() + b"\n")
    write_atomic(meta_path(path), json.dumps(meta, indent=1).encode() + b"\n")


def check_paths(path: Path | None) -> None:
    """Raise now, and not after the work, if `write` could not write to `path`."""
    if path is not None:
        check_output(path)
        check_output(meta_path(path))


def meta_path(path: Path) -> Path:
    """Where `write` puts the sidecar of `path`."""
    return path.with_suffix(".meta.json")


def describe(sweeps: Iterable[Measured], command: list[str]) -> dict:
    """Hardware, versions, commit and command behind some sweeps; what `auto` took in each."""
    sweeps = list(sweeps)
    return {
        **circumstances(command, machine=sweeps[0].machine, versions=sweeps[0].versions),
        "sweeps": [
            {
                "ranks": sweep.rows[0]["ranks"],
                "link": sweep.rows[0]["link"],
                "auto": [
                    {"codec": codec, "bytes": size, "collective": collective}
                    for codec, size, collective in sweep.choices
                ],
                "timed_calls": [min(sweep.calls), max(sweep.calls)],
            }
            for sweep in sweeps
        ],
    }


def circumstances(command: list[str], *, machine: dict, versions: dict[str, str]) -> dict:
    """What figures must carry: command, date, machine, versions and commit."""
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": {"megatron_lowbit": __version__, **versions},
        "commit": commit(),
    }


def command_line() -> list[str]:
    """The command that runs, as it can be given again."""
    return [Path(sys.executable).name, *sys.orig_argv[1:]]


def variant_name(row: Row) -> str:
    """A variant in a few words: ``rotated-hybrid 4+6 two-shot``, ``fp8-g256 two-shot``."""
    if _is_native(row):
        return row["codec"]
    name, bits = row["codec"].removesuffix(" bits)").split(" (")
    named = re.match(r"[a-z]+(\d+)-", name)
    codec = name if named and named[1] == bits else f"{name} {bits}"
    return f"{codec} {row['collective']}"


def by_variant(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by their variant's name, in order of appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(variant_name(row), []).append(row)
    return found


def _table(rows: list[Row]) -> list[str]:
    native = {r["bytes"]: r for r in rows if r["codec"] == "native bf16"}
    columns = [
        (name, {r["bytes"]: f"{r['speedup']:.2f}x" for r in mine})
        for name, mine in by_variant([r for r in rows if r["codec"] != "native bf16"]).items()
    ]
    # A name takes several lines of the head, so that nine columns fit a terminal.
    heads = [["size"], ["native", "ms"], *(_broken(name) for name, _ in columns)]
    depth = max(map(len, heads))
    lines = [[""] * (depth - len(head)) + head for head in heads]
    lines = [list(line) for line in zip(*lines, strict=True)]
    for size in sorted(native):
        speedups = [cells.get(size, "-") for _, cells in columns]
        lines.append([size_text(size), _ms(native[size]["median_ms"]), *speedups])
    text = aligned(lines, left=0)
    return [*text[:depth], "-" * len(text[0]), *text[depth:]]


def _broken(name: str) -> list[str]:
    """The words of `name`, long ones broken at a hyphen."""
    return re.sub(r"(\w{4,}-)(?=\w{5,})", r"\1 ", name).split(" ")


def _by_setting(rows: list[Row]) -> dict[tuple[int, str], list[Row]]:
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["ranks"], row["link"]), []).append(row)
    return groups


def _is_native(row: Row) -> bool:
    return row["codec"].startswith("native")


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
