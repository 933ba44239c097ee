"""Labels of the report's plots: none over another, each as near as it gets."""

import random
from itertools import combinations

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pydantic")

from megatron_lowbit.evaluation.report import style  # noqa: E402
from megatron_lowbit.evaluation.report.labels import (  # noqa: E402
    Point,
    _spread,
    label_ends,
    label_points,
)


def _boxes(axes) -> list:
    return [text.get_window_extent() for text in axes.texts]


@pytest.mark.parametrize("seed", range(4))
def test_labels_of_crowded_points_do_not_overlap(seed):
    random_ = random.Random(seed)
    spots = [(random_.uniform(4, 4.6), random_.lognormvariate(-2, 0.6)) for _ in range(14)]
    points = [Point(x, y, y, y, f"some-codec-{i}") for i, (x, y) in enumerate(spots)]
    with style.figure(4) as made:
        axes = made.subplots(1, 2)[0]
        axes.plot(*zip(*spots, strict=True), "o")
        axes.set(yscale="log", xlim=(2, 8), ylim=(0.003, 3))
        style.freeze(made)
        label_points(axes, points, [])
        boxes = _boxes(axes)
        assert sorted(text.get_text() for text in axes.texts) == sorted(p.text for p in points)
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        dots = axes.transData.transform(spots)
        assert not any(box.contains(*dot) for box in boxes for dot in dots)
        assert all(axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1 for box in boxes)


def test_labels_of_line_ends_do_not_overlap():
    with style.figure(3) as made:
        axes = made.subplots()
        made.get_layout_engine().set(rect=(0, 0, 0.8, 1))
        axes.set(xlim=(0, 1), ylim=(0, 1))
        style.freeze(made)
        label_ends(axes, [(0.5 + i / 1000, style.INK, f"line {i}") for i in range(8)])
        boxes = [text.get_window_extent() for text in made.texts]
        assert len(boxes) == 8
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        assert all(box.x0 > axes.bbox.x1 for box in boxes)


def test_spread_keeps_order_and_gaps_and_moves_nothing_that_has_room():
    wanted = np.array([50.0, 10.0, 12.0, 11.0, 90.0])
    placed = _spread(wanted, 5.0)
    assert placed[[1, 3, 2]].tolist() == [6.0, 11.0, 16.0]  # around their mean
    assert placed[[0, 4]].tolist() == [50.0, 90.0]


@pytest.mark.parametrize("seed", range(5))
def test_spread_always_leaves_the_gap(seed):
    wanted = np.random.default_rng(seed).uniform(0, 40, size=12)
    placed = _spread(wanted, 5.0)
    order = np.argsort(wanted)
    assert np.all(np.diff(placed[order]) >= 5.0 - 1e-9)
