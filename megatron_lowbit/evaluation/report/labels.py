"""Labels beside what they name, none over another.

Two cases are enough here: points of a scatter plot, whose labels try places around them, and ends
of lines, whose labels stand in a column at the right edge. Both are exact about the size of a text
and give the same picture every time. (The adjustText package does the first by simulated forces,
and needs SciPy.)
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from megatron_lowbit.evaluation.report.style import INK, MUTED

_DISTANCES = (5, 8, 12, 17, 23, 30, 38, 47, 57, 70)  # points from the marker to the label
_ANGLES = (0, 180, 35, -35, 145, -145, 60, -60, 120, -120, 90, -90)  # degrees
_NEAR = 8  # points: beyond, a line leads from the label to its point
_MARKER = 4.0  # half of a marker and some air, points
_SIZE = 7.5  # of letters
_AIR = 1.5  # around a label, points


@dataclass(frozen=True)
class Point:
    """A point to label, in data coordinates, with the ends of its error bar."""

    x: float
    y: float
    low: float
    high: float
    text: str


def label_points(
    axes: Axes, points: list[Point], curves: list[list[tuple[float, float]]], *, size: float = _SIZE
) -> None:
    """Label points; the figure must be frozen.

    The most crowded point is labelled first. Each takes the place that is the nearest of those
    that hide the least; a label that is not next to its point gets a thin line to it.

    Args:
        axes: Where.
        points: What to label.
        curves: Corners of lines, in data, that labels had better not cover.
        size: Of the letters.
    """
    unit = axes.figure.dpi / 72
    spots = axes.transData.transform([(point.x, point.y) for point in points])
    markers = [_around(axes, point, unit) for point in points]
    lines = [spot for curve in curves for spot in _along(axes.transData.transform(curve))]
    gaps = [sorted(math.dist(a, b) for b in spots)[1:3] for a in spots]
    taken: list[Bbox] = []
    for number in sorted(range(len(points)), key=lambda one: sum(gaps[one])):
        width, height = _size(axes, points[number].text, size)
        others = markers[:number] + markers[number + 1 :]
        places = _places(spots[number], width + 2 * _AIR * unit, height + 2 * _AIR * unit, unit)
        box, end, distance = min(
            places,
            key=lambda place: (
                _cost(place, spots[number], axes.bbox, markers[number], others, taken)
                + 4 * sum(place[0].contains(*at) for at in lines)
            ),
        )
        taken.append(box)
        _write(axes, points[number], box, end if distance > _NEAR else None, size)


def label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Label lines at the right edge, in a column; the figure must be frozen.

    Of each line `ends` has the height at its right end, in data, its colour and its label.
    """
    unit = axes.figure.dpi / 72
    x = axes.get_xlim()[1]
    wanted = np.array([axes.transData.transform((x, y))[1] for y, _, _ in ends])
    placed = _spread(wanted, (_SIZE + 2.2) * unit)
    edge = axes.bbox.x1
    inverted = axes.figure.transFigure.inverted()
    for (_, color, text), height, at in zip(ends, wanted, placed, strict=True):
        (left, low), (right, high) = inverted.transform(
            [(edge + 1 * unit, height), (edge + 10 * unit, at)]
        )
        axes.figure.add_artist(Line2D([left, right], [low, high], color=color, linewidth=0.7))
        axes.figure.text(
            *inverted.transform((edge + 12 * unit, at)), text, fontsize=_SIZE, va="center_baseline"
        )


def _around(axes: Axes, point: Point, unit: float) -> Bbox:
    """What a label must not cover of a point: the marker with its error bar."""
    (x, low), (_, high) = axes.transData.transform([(point.x, point.low), (point.x, point.high)])
    return Bbox.from_extents(
        x - _MARKER * unit, low - _MARKER * unit, x + _MARKER * unit, high + _MARKER * unit
    )


def _size(axes: Axes, text: str, size: float) -> tuple[float, float]:
    probe = axes.text(0, 0, text, fontsize=size)
    box = probe.get_window_extent()
    probe.remove()
    return box.width, box.height


def _places(spot, width: float, height: float, unit: float):
    """Boxes around a point, nearest first, each with its corner or side next to the point."""
    for distance in _DISTANCES:
        for angle in _ANGLES:
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            end = (spot[0] + distance * unit * dx, spot[1] + distance * unit * dy)
            # The box hangs on `end` by the side that faces the point.
            left = end[0] - width * (0.5 if abs(dx) < 0.1 else float(dx < 0))
            low = end[1] - height * (0.5 if abs(dy) < 0.1 else float(dy < 0))
            yield Bbox.from_bounds(left, low, width, height), end, distance


def _cost(place, spot, panel: Bbox, own: Bbox, markers: list[Bbox], taken: list[Bbox]) -> float:
    """What a place hides, before all; then whose it seems, what its line crosses, how far it is."""
    box, end, distance = place
    outside = int(not (panel.x0 <= box.x0 and box.x1 <= panel.x1))
    outside += not (panel.y0 <= box.y0 and box.y1 <= panel.y1)
    hidden = sum(box.overlaps(other) for other in (own, *markers, *taken))
    nearer = sum(_gap(box, other) < 1.5 * _gap(box, own) + 1 for other in markers)
    line = _along(np.array([spot, end]))[3:]
    crossed = sum(any(other.contains(*at) for at in line) for other in (*markers, *taken))
    return 1000 * (outside + hidden) + 60 * crossed + 14 * nearer + distance


def _gap(box: Bbox, other: Bbox) -> float:
    """Pixels between two boxes, 0 if they touch."""
    across = max(box.x0 - other.x1, other.x0 - box.x1, 0)
    return math.hypot(across, max(box.y0 - other.y1, other.y0 - box.y1, 0))


def _along(corners: np.ndarray) -> list[tuple[float, float]]:
    """Positions along a line through `corners`, ten for each stretch."""
    steps = np.linspace(0, 1, 10)[:, None]
    return [tuple(at) for a, b in pairwise(corners) for at in a + steps * (b - a)]


def _write(axes: Axes, point: Point, box: Bbox, end, size: float) -> None:
    inverted = axes.transData.inverted()
    if end is not None:
        to = inverted.transform(end)
        (line,) = axes.plot([point.x, to[0]], [point.y, to[1]], scalex=False, scaley=False)
        line.set(color=MUTED, linewidth=0.6, zorder=1.9)
    # By the side that faces the point: in the PNG a text is a little wider than it is here.
    x = axes.transData.transform((point.x, point.y))[0]
    side = "left" if box.x0 >= x else "right" if box.x1 <= x else "center"
    place = {"left": box.x0 + _AIR, "right": box.x1 - _AIR, "center": (box.x0 + box.x1) / 2}[side]
    at = inverted.transform((place, (box.y0 + box.y1) / 2))
    axes.text(*at, point.text, fontsize=size, color=INK, ha=side, va="center", zorder=5)


def _spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Positions as near as they get to `wanted`, in its order, `gap` apart at least.

    Groups that touch are moved together, to where they are off by the least squares (the pool
    adjacent violators rule).
    """
    order = np.argsort(wanted, kind="stable")
    groups: list[list[float]] = []  # the wished position of each group's first, and its length
    for place, number in enumerate(order):
        groups.append([wanted[number] - place * gap, 1])
        while len(groups) > 1 and groups[-2][0] >= groups[-1][0]:
            last, before = groups.pop(), groups[-1]
            total = before[1] + last[1]
            before[:] = [(before[0] * before[1] + last[0] * last[1]) / total, total]
    starts = np.repeat([start for start, _ in groups], [int(length) for _, length in groups])
    placed = np.empty_like(wanted)
    placed[order] = starts + gap * np.arange(len(wanted))
    return placed
