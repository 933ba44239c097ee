"""The GPU tables of kernels/README.md, filled from ``gpu_check.json``.

Cells are found by the head of their table and the label of their row; what stands there stays but
for the last column. What was not measured says how its stage ended. Between two marks lies what is
written whole: the machine, the stages, the best settings.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_lowbit.benchmark.gpu_check.gpu_results import PASSED, Content
from megatron_lowbit.benchmark.gpu_check.gpu_stages import STAGES
from megatron_lowbit.benchmark.gpu_check.stage_tasks import Row
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import commit, sources_digest

BEGIN, END = "<!-- gpu-check -->", "<!-- /gpu-check -->"
SPEED_HEAD = "| work (GPU, medians) |"
COSTS_HEAD = "| kernel | bytes a value |"
_LONG, _SHORT = (4096,), (1, 16, 64)  # tokens
_HIDDEN, _REASON = 8192, 160
_GRAPH_US = 6.0


class Wanted(NamedTuple):
    """Which rows of the stage ``speed`` a cell is of.

    Attributes:
        codec: By its name in results.
        operation: Of `codec_cases`.
        path: ``kernel``, ``tensor-cores`` or ``graph``.
        tokens: Of its messages, a figure each.
        goal: Least share of the copy's bandwidth; None without one.
    """

    codec: str
    operation: str
    path: str = "kernel"
    tokens: tuple[int, ...] = _LONG
    goal: float | None = None


SPEED = {
    "encode with folded weights, 4096 x 8192": Wanted(
        "rotated-hybrid-4", "encode, folded", goal=0.85
    ),
    "encode with the rotation in the kernel": Wanted("rotated-hybrid-4", "encode", goal=0.75),
    "the same, the rotation on tensor cores": Wanted("rotated-hybrid-4", "encode", "tensor-cores"),
    "decode_sum, 8 payloads, 4096 x 8192": Wanted("rotated-hybrid-4", "decode_sum of 8", goal=0.8),
    "encode + decode_sum at 1-64 tokens, graph replay": Wanted(
        "rotated-hybrid-4", "encode + decode_sum of 8", "graph", _SHORT
    ),
}
COSTS = {
    "`encode`": Wanted("shaped-hybrid-4", "encode"),
    "`decode_sum`": Wanted("shaped-hybrid-4", "decode_sum of 8"),
    "`encode` with a carry": Wanted("shaped-hybrid-4", "encode with a carry"),
    "`reduce_encode`": Wanted("shaped-hybrid-4", "reduce_encode of 8"),
    "`reduce_encode` with a carry": Wanted("shaped-hybrid-4", "reduce_encode of 8 with a carry"),
    "`decode_sum_norm`": Wanted("shaped-hybrid-4", "decode_sum_norm of 8"),
}


def filled(page: str, content: Content) -> str:
    """`page`, the text of kernels/README.md, with the results in it.

    Raises:
        LowbitError: The page has no such table, row or marks, or a figure is damaged.
    """
    for head, cells in ((SPEED_HEAD, SPEED), (COSTS_HEAD, COSTS)):
        page = _with_cells(page, head, {key: _cell(content, of) for key, of in cells.items()})
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise LowbitError(f"the page has no part between {BEGIN} and {END}: put it back")
    return f"{before}{BEGIN}\n{_about(content)}\n{END}{after}"


def _with_cells(page: str, head: str, cells: dict[str, str]) -> str:
    """The last cell of each labelled row of the table that begins with `head`."""
    lines, missing = page.split("\n"), dict(cells)
    start = next((n for n, line in enumerate(lines) if line.startswith(head)), len(lines))
    for number in range(start, len(lines)):
        if not lines[number].startswith("|"):
            break
        row = lines[number].strip("|").split("|")
        if row[0].strip() in missing:
            lines[number] = "|" + "|".join([*row[:-1], f" {missing.pop(row[0].strip())} "]) + "|"
    if missing:
        raise LowbitError(f"the page has no row {next(iter(missing))!r} in {head!r}: put it back")
    return "\n".join(lines)


def _cell(content: Content, wanted: Wanted) -> str:
    """Figures, or how the stage ended without them."""
    found = [_measured(content, wanted, tokens) for tokens in wanted.tokens]
    if None in found:
        return content["stages"]["speed"]["status"].replace(PASSED, "not measured")
    rows = [row for row in found if row is not None]
    if wanted.path == "graph":
        times = [1000 * _number(row, "median_ms") for row in rows]
        missed = ", missed" if max(times) > _GRAPH_US else ""
        return ", ".join(f"{time:.1f}" for time in times) + f" us{missed}"
    share = _number(rows[0], "copy_share")
    missed = ", missed" if wanted.goal is not None and share < wanted.goal else ""
    return f"{share:.0%}{missed}"


def _measured(content: Content, wanted: Wanted, tokens: int) -> Row | None:
    key = (wanted.codec, wanted.operation, wanted.path, tokens, _HIDDEN)
    names = ("codec", "operation", "path", "tokens", "hidden")
    rows = _speed_rows(content)
    return next((row for row in rows if tuple(map(row.get, names)) == key), None)


def _speed_rows(content: Content) -> Iterator[Row]:
    for result in content["stages"]["speed"]["results"]:
        rows = result.get("rows", [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise LowbitError("damaged results of the stage speed: make the check again")
        yield from rows


def _number(row: Row, key: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise LowbitError(f"damaged result: {key} is {value!r:.60}: make the check again")
    return value


def _about(content: Content) -> str:
    """The machine, the stages and the best settings."""
    machine = content["machine"]
    versions = ", ".join(f"{n} {machine.get(n, 'unknown')}" for n in ("torch", "triton"))
    where = f"{machine.get('device', 'no GPU')}, driver {machine.get('driver', 'unknown')}"
    lines = [f"{where}, {versions}, {content['date'][:10]}, {_origin(content)}.", ""]
    lines += ["| stage | what | result |", "| --- | --- | --- |"]
    for stage in STAGES:
        lines.append(f"| {stage.name} | {stage.about} | {_result(content['stages'][stage.name])} |")
    best = [
        _setting(row["best"]) for row in content["stages"]["settings"]["results"] if "best" in row
    ]
    return "\n".join(lines + (["", f"Best settings: {'; '.join(best)}."] if best else []))


def _result(entry: dict[str, Any]) -> str:
    count = sum("error" not in row for row in entry["results"])
    text = f"{entry['status']}, {count} results" if count else entry["status"]
    reason = " ".join(entry["reason"].split())[:_REASON].replace("|", "\\|")
    return f"{text}: {reason}" if reason else text


def _setting(best: Row) -> str:
    """Of one operation, in words."""
    if not isinstance(best, dict):
        raise LowbitError("damaged results of the stage settings: make the check again")
    time = f"{_number(best, 'median_ms'):.3g} ms"
    if "chunk_values" in best:
        return f"{best.get('operation')} in chunks of {best['chunk_values']} values ({time})"
    return f"{best.get('operation')} by {best.get('rotation')}, {best.get('warps')} warps ({time})"


def _origin(content: Content) -> str:
    """The commit, which a copy without git knows by its sources alone."""
    if content["commit"] != "unknown":
        return f"commit {content['commit']}"
    if content["sources"] == sources_digest():
        return f"commit {commit()}, by its sources"
    return f"sources {content['sources'][:12]}, which are not those here"
