"""What differs from layer to layer: ranges, the quantization error, the recipe."""

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from megatron_lowbit.evaluation.evaluation_schema import PointError, SyncPoints
from megatron_lowbit.evaluation.measures.sync_error import BELOW_MEDIAN_DB, LOW_DB
from megatron_lowbit.evaluation.report import style
from megatron_lowbit.evaluation.report.findings import CodecError, codec_errors
from megatron_lowbit.evaluation.report.index_reader import (
    LEVEL_NAMES,
    PointRanges,
    RecipePoint,
    by_kind,
)
from megatron_lowbit.evaluation.report.labels import label_ends
from megatron_lowbit.evaluation.report.results import ResultFile

_BAND = style.color_of("shaped-hybrid")
_CHOSEN = style.color_of("static-hybrid")
_ALPHAS = (0.36, 0.22, 0.12)  # of the bands from the median up
_ALL, _WORST = "all tokens", "worst token"
_RECIPE = {"bits": "bits of a value", "bf16_features": "BF16 features"}
_DASHES = (
    "-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (10, 3)),
    (0, (6, 2, 1.5, 2, 1.5, 2)), (0, (3, 1.5)), (0, (10, 2, 3, 2)),
)  # fmt: skip


def draw_ranges(name: str, points: list[PointRanges]) -> style.Plot:
    """Quantiles of the features' ranges over layers, a panel a kind of sync point."""
    kinds = by_kind(points)
    with style.figure(4.2) as made:
        grid = made.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        made.get_layout_engine().set(rect=(0, 0, 0.95, 1), wspace=0.13)
        for axes, (kind, mine) in zip(grid, kinds.items(), strict=True):
            _bands(axes, mine)
            axes.set_title(kind)
            style.layer_axis(axes, [point.layer for point in mine])
        grid[0].set_ylabel("range of a feature, summed over ranks")
        grid[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        style.freeze(made)
        for axes, mine in zip(grid, kinds.values(), strict=True):
            last = zip(mine[-1].quantiles, LEVEL_NAMES, strict=True)
            label_ends(axes, [(max(value, _floor(mine)), _BAND, text) for value, text in last])
        return style.finish(
            made,
            name,
            "Range of a feature: R = 2 max(|min|, |max|) by the calibration's moving average, "
            "in units of the activations, summed over ranks. Bands: median to 90 %, to 99 %, to "
            "the widest of all features. Dots: the features in BF16 where one codec serves all "
            "sync points. What matters is how far the widest feature without a dot is above the "
            "median.",
        )


def _floor(points: list[PointRanges]) -> float:
    """The least range that is shown: a log axis has no zero."""
    positive = [value for point in points for value in point.quantiles if value > 0]
    return min(positive, default=1.0)


def _bands(axes: Axes, points: list[PointRanges]) -> None:
    layers = [point.layer for point in points]
    floor = _floor(points)
    each = zip(*(point.quantiles for point in points), strict=True)
    levels = [[max(value, floor) for value in level] for level in each]
    for low, high, alpha in zip(levels, levels[1:], _ALPHAS, strict=False):
        axes.fill_between(layers, low, high, color=_BAND, alpha=alpha, linewidth=0)
    for level, width in zip(levels, (1.6, 0.6, 0.6, 1.0), strict=True):
        axes.plot(layers, level, color=_BAND, linewidth=width)
    dots = [(point.layer, value) for point in points for value in point.chosen if value > 0]
    if dots:
        look = {"color": _CHOSEN, "markersize": 4, "zorder": 3, "clip_on": False}
        axes.plot(*zip(*dots, strict=True), ".", label="BF16 features", **look)
        axes.legend(loc="upper left", frameon=False, fontsize=7.5, handletextpad=0.1)
    axes.set_yscale("log")


def draw_sqnr(name: str, file: ResultFile, measured: SyncPoints) -> style.Plot | None:
    """SQNR over layers: a column a kind of sync point, all tokens above, the worst below."""
    errors = [error for error in codec_errors(measured) if error.codec != style.REFERENCE]
    if not errors:
        return None
    kinds = by_kind(measured.points)
    with style.figure(8.6) as made:
        grid = made.subplots(2, len(kinds), sharex=True, sharey=True, squeeze=False)
        made.get_layout_engine().set(rect=_beside([e.codec for e in errors]), wspace=0.38)
        ends = {}
        for row, what in zip(grid, (_ALL, _WORST), strict=True):
            row[0].set_ylabel(f"SQNR, {what}, dB")
            for axes, (kind, points) in zip(row, kinds.items(), strict=True):
                ends[axes] = _error_lines(axes, points, errors, what)
                axes.set_title(f"{kind}, {what}")
        for axes in grid.flat:
            style.layer_axis(axes, [point.layer for point in measured.points])
            axes.label_outer()
        style.freeze(made)
        for axes, labels in ends.items():
            label_ends(axes, labels)
        return style.finish(
            made,
            name,
            f"{file.label}: signal to quantization noise of the sum at each sync point, over "
            f"{measured.sequences} sequences; 6 dB is a bit. Rings: more than "
            f"{BELOW_MEDIAN_DB:g} dB below the codec's median. Dotted line: {LOW_DB:g} dB. What is "
            "ringed, or under the line, is named in the table. Codec bf16 is left out.",
        )


def draw_stream(name: str, file: ResultFile, measured: SyncPoints) -> style.Plot | None:
    """SQNR of the residual stream behind each sync point, in call order."""
    variants = [v for v in measured.points[0].stream_sqnr if v != style.REFERENCE]
    if not variants:
        return None
    with style.figure(4.6) as made:
        axes = made.subplots()
        made.get_layout_engine().set(rect=_beside(variants))
        ends: list[tuple[float, str, str]] = []
        for variant, dash in zip(variants, _dashes(variants), strict=True):
            values = [point.stream_sqnr.get(variant) for point in measured.points]
            curve = [(n, value) for n, value in enumerate(values, 1) if value is not None]
            if curve:
                ends.append(_line(axes, curve, variant, dash))
        axes.set_xlabel("sync point, in call order")
        axes.set_ylabel("SQNR of the stream, dB")
        style.freeze(made)
        label_ends(axes, ends)
        return style.finish(
            made,
            name,
            f"{file.label}: the error of the residual stream behind each sync point, which is what "
            "the next block sees: signal to noise of all that the sync points have added so far. "
            "Without feedback errors pile up; with it the next sum repairs each.",
        )


def _beside(labels: list[str]) -> tuple[float, float, float, float]:
    """The part of a figure that leaves room for the longest label at its right edge."""
    return 0, 0, max(1 - 0.03 - 0.0064 * max(map(len, labels)), 0.5), 1


def _error_lines(axes: Axes, points: list[PointError], errors: list[CodecError], what: str) -> list:
    """Draw a line a codec; give the labels of their ends."""
    key = "sqnr" if what == _ALL else "worst_token_sqnr"
    ends = []
    dashes = _dashes([error.codec for error in errors])
    for error, dash in zip(errors, dashes, strict=True):
        curve = [
            (point.layer, value)
            for point in points
            if (value := getattr(point, key).get(error.codec)) is not None
        ]
        if not curve:
            continue
        ends.append(_line(axes, curve, error.codec, dash))
        color = style.color_of(error.codec)
        for layer, value in curve:
            if what == _ALL and value < error.median - BELOW_MEDIAN_DB:
                axes.plot(layer, value, "o", color=color, mfc="none", markersize=8, clip_on=False)
    axes.axhline(LOW_DB, color=style.MUTED, linewidth=1.1, linestyle=(0, (2, 2)), zorder=1)
    return ends


def _line(
    axes: Axes, curve: list[tuple[int, float]], codec: str, dash: object
) -> tuple[float, str, str]:
    """Draw a codec's line; give the label of its end."""
    color = style.color_of(codec)
    axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.2, linestyle=dash)
    return curve[-1][1], color, codec


def _dashes(codecs: list[str]) -> list:
    """A dash for each codec: another one for each of a family, the plain line for its first."""
    families = [style.family_of(codec) for codec in codecs]
    before = [families[:place].count(family) for place, family in enumerate(families)]
    return [_DASHES[count % len(_DASHES)] for count in before]


def draw_recipe(name: str, points: list[RecipePoint]) -> style.Plot:
    """Bits and BF16 features over layers: a row a kind of sync point."""
    kinds = by_kind(points)
    with style.figure(0.6 + 1.8 * len(kinds)) as made:
        grid = made.subplots(len(kinds), 2, sharex=True, sharey="col", squeeze=False)
        for row, (kind, mine) in zip(grid, kinds.items(), strict=True):
            for axes, (key, what) in zip(row, _RECIPE.items(), strict=True):
                known = [p for p in mine if getattr(p, key) is not None]
                layers = [point.layer for point in known]
                values = [getattr(point, key) for point in known]
                axes.vlines(layers, 0, values, color=_BAND, linewidth=1, alpha=0.5)
                axes.plot(layers, values, "o", color=_BAND, markersize=4.5, clip_on=False)
                if key == "bits":
                    _draw_sums(axes, mine)
                axes.set_title(f"{kind}: {what}")
        for axes in grid[0]:
            axes.set_ylim(0, max(axes.get_ylim()[1], 1) * 1.08)  # also where all are zero
            axes.yaxis.get_major_locator().set_params(integer=True)
        for axes in grid.flat:
            style.layer_axis(axes, [point.layer for point in points])
            axes.xaxis.label.set_visible(axes in grid[-1])
        caption = "What the calibration index's recipe gives to each sync point."
        if any(point.sum_bits is not None for point in points):
            caption += " Hollow: the bits of sums in two-shot, where they are others."
        return style.finish(made, name, caption)


def _draw_sums(axes, points: list[RecipePoint]) -> None:
    """Bits of sums, where they are not those of partials."""
    known = [(point.layer, point.sum_bits) for point in points if point.sum_bits is not None]
    if known:
        layers, bits = zip(*known, strict=True)
        hollow = {"markerfacecolor": "none", "markersize": 6, "clip_on": False}
        axes.plot(layers, bits, "o", color=_BAND, **hollow)
