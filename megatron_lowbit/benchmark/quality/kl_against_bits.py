"""The picture of the first page: KL against bits a value, from the tables in benchmark/README.md.

It needs no measurement: the rows were measured by tools/bench_quality.py and stand on that page.

example:
  python -m megatron_lowbit.benchmark.quality.kl_against_bits
"""

import io
from pathlib import Path

from matplotlib import rc_context

from megatron_lowbit.evaluation.report import style
from megatron_lowbit.evaluation.report.labels import Point, label_points
from megatron_lowbit.files import write_atomic

PICTURE = Path(__file__).with_suffix(".svg")
PAGE = PICTURE.parents[1] / "README.md"
SECTIONS = ("### Error feedback", "### Codecs and recipes", "### Peers' formats")
_HEIGHT = 6.2  # inches


def read_rows(page: str) -> list[Point]:
    """The one-shot rows of each section's first such table, each name once; not bf16, at zero."""
    points: list[Point] = []
    for section in SECTIONS:
        lines = page.split(section, 1)[1].splitlines()
        start = next(n for n, line in enumerate(lines) if line.startswith("| variant |"))
        for line in lines[start + 2 :]:
            if not line.startswith("|"):
                break
            name, collective, bits, _, kl, *_ = (
                cell.strip() for cell in line.strip("|").split("|")
            )
            mean, error = map(float, kl.split(" ± "))
            is_new = name not in {point.text for point in points}
            if collective == "one-shot" and mean > 0 and is_new:
                points.append(Point(float(bits), mean, mean - error, mean + error, name))
    return points


def draw(points: list[Point]) -> bytes:
    """The picture as SVG. Lines join the recipes, which differ in their budget of bits only."""
    recipes = [p for p in points if style.family_of(p.text) == "recipe"]
    lines = [
        sorted((p.x, p.y) for p in recipes if p.text.endswith("@feedback") == carries)
        for carries in (False, True)
    ]
    with style.figure(_HEIGHT) as made:
        axes = made.subplots()
        for line in lines:
            axes.plot(*zip(*line, strict=True), color=style.color_of("recipe"), alpha=0.45)
        for point in points:
            color, error = style.color_of(point.text), point.y - point.low
            axes.errorbar(point.x, point.y, yerr=error, color=color, marker="o", markersize=5.5)
        axes.set_xlabel("bits a value on the wire, all included")
        axes.set_ylabel("KL from native BF16, nats a token")
        axes.set_title(
            "KL against bits: lower and further left is better (one-shot, prose, simulated TP 3)"
        )
        axes.margins(x=0.06)
        dots = style.family_dots(point.text for point in points)
        axes.legend(handles=dots, loc="upper right")
        style.log_axis(axes)
        style.freeze(made)
        label_points(axes, points, lines, size=8)
        buffer = io.BytesIO()
        with rc_context({"svg.fonttype": "path", "svg.hashsalt": PICTURE.stem}):
            made.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return b"\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + b"\n"


def main() -> None:
    """Draw the page's rows into the picture beside this file."""
    write_atomic(PICTURE, draw(read_rows(PAGE.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
