"""Loss and KL against bits per value: a figure a text, a row an evaluation."""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from megatron_lowbit.evaluation.evaluation_schema import (
    Evaluation,
    Number,
    Text,
    Variant,
)
from megatron_lowbit.evaluation.report import style
from megatron_lowbit.evaluation.report.labels import Point, label_points
from megatron_lowbit.evaluation.report.results import ResultFile

_MARKERS = {"one-shot": "o", "two-shot": "s"}  # filled and open; others a diamond
_NOT_VERSIONS = ("peer", "paper-baseline", "try")  # families of codecs that are not joined
_LEGEND_COLUMNS = 6  # as many as the width has room for
_LEAST = 2e-5  # nats: below, a log axis would show only noise


@dataclass(frozen=True)
class _Spot:
    """A codec in a panel: both coordinates known."""

    variant: Variant
    x: float
    y: float
    error: float


def draw(name: str, panels: list[tuple[ResultFile, Text]]) -> style.Plot:
    """The plot of one text: loss left and KL right, all with the same axes, a row an evaluation."""
    with style.figure(0.8 + 3.9 * len(panels)) as made:
        grid = made.subplots(len(panels), 2, sharex=True, sharey="col", squeeze=False)
        for line, (file, text) in zip(grid, panels, strict=True):
            for axes, metric in zip(line, style.METRICS, strict=True):
                _panel(axes, file.data, text, metric)
                axes.set_ylabel(style.METRICS[metric])
            line[0].set_title(f"{file.label}: {text.name}, {text.tokens:,} tokens")
        for column, metric in zip(grid.T, style.METRICS, strict=True):
            column[-1].set_xlabel("bits a value on the wire")
            _limits(column, [_spots(f.data, text, metric) for f, text in panels], panels, metric)
        _legend(made, [file.data for file, _ in panels])
        style.freeze(made)
        for line, (file, text) in zip(grid, panels, strict=True):
            for axes, metric in zip(line, style.METRICS, strict=True):
                _label(axes, _spots(file.data, text, metric))
        return style.finish(made, name, _caption(panels))


def _panel(axes: Axes, evaluation: Evaluation, text: Text, metric: str) -> None:
    spots = _spots(evaluation, text, metric)
    _join(axes, spots)
    for spot in spots:
        color, collective = style.color_of(spot.variant.name), spot.variant.collective
        axes.errorbar(
            spot.x,
            spot.y,
            yerr=[[min(spot.error, 0.999 * spot.y)], [spot.error]],
            color=color,
            marker=_MARKERS.get(collective, "D"),
            markerfacecolor=color if collective == "one-shot" else style.PAPER,
            markersize=5.5,
            markeredgewidth=1.4,
            linewidth=1.2,
            zorder=3,
        )
    _reference(axes, text, metric)
    style.log_axis(axes)


def _spots(evaluation: Evaluation, text: Text, metric: str) -> list[_Spot]:
    """What a log axis can show: values above zero, of codecs that quantize."""
    spots = []
    for result in text.results:
        value, variant = getattr(result, metric), evaluation.variant(result.variant)
        x, is_reference = variant.bits_per_value, result.variant == style.REFERENCE
        if not is_reference and x is not None and value is not None and value > _LEAST:
            spots.append(_Spot(variant, x, value, getattr(result, f"{metric}_stderr") or 0.0))
    return spots


def _curves(spots: list[_Spot]) -> dict[tuple[str, str], list[_Spot]]:
    """The versions of one codec that differ in bits only, by family and collective."""
    curves: dict[tuple[str, str], list[_Spot]] = {}
    for spot in spots:
        family = style.family_of(spot.variant.name)
        if family not in _NOT_VERSIONS:
            curves.setdefault((family, spot.variant.collective), []).append(spot)
    return {key: sorted(curve, key=lambda spot: spot.x) for key, curve in curves.items()}


def _join(axes: Axes, spots: list[_Spot]) -> None:
    """A light line along each of the `_curves`."""
    for (family, collective), curve in _curves(spots).items():
        axes.plot(
            [spot.x for spot in curve],
            [spot.y for spot in curve],
            color=style.color_of(family),
            linewidth=1.1,
            linestyle="-" if collective == "one-shot" else (0, (4, 3)),
            alpha=0.45,
            zorder=1.5,
        )


def _noise(text: Text, metric: str) -> Number:
    """The measurement's own floor: what codec bf16 scores, at the outer end of its error."""
    for result in text.results:
        value = getattr(result, metric)
        if result.variant == style.REFERENCE and value is not None:
            return abs(value) + (getattr(result, f"{metric}_stderr") or 0.0)
    return None


def _reference(axes: Axes, text: Text, metric: str) -> None:
    noise = _noise(text, metric)
    if noise is None or noise <= _LEAST:
        return
    axes.axhline(noise, color=style.color_of(style.REFERENCE), linewidth=1.1, linestyle=(0, (2, 2)))
    axes.annotate(
        f"native noise (codec bf16): {noise:.2g}",
        (1, noise),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=7.5,
        color=style.MUTED,
    )


def _limits(column, spots: list[list[_Spot]], panels, metric: str) -> None:
    """The same axes for a metric in all rows, with room for labels."""
    known = [spot for one in spots for spot in one]
    heights = [end for s in known for end in (s.y + s.error, max(s.y - s.error, s.y / 3))]
    heights += [noise for _, text in panels if (noise := _noise(text, metric)) is not None]
    heights = [height for height in heights if height > _LEAST]
    axes = column[0]
    if heights:
        room = max((max(heights) / min(heights)) ** 0.06, 1.2)
        axes.set_ylim(min(heights) / room, max(heights) * room)
    if known:
        left, right = min(s.x for s in known), max(s.x for s in known)
        room = 0.3 + 0.12 * (right - left)  # for labels
        axes.set_xlim(left - room, right + room)


def _label(axes: Axes, spots: list[_Spot]) -> None:
    points = [
        Point(s.x, s.y, max(s.y - s.error, s.y / 3), s.y + s.error, s.variant.name) for s in spots
    ]
    if points:
        curves = [[(spot.x, spot.y) for spot in curve] for curve in _curves(spots).values()]
        label_points(axes, points, curves)


def _legend(made, evaluations: list[Evaluation]) -> None:
    """Colours and markers that occur, above the panels."""
    variants = [v for one in evaluations for v in one.variants if v.name != style.REFERENCE]
    handles = style.family_dots(variant.name for variant in variants)
    for collective in dict.fromkeys(variant.collective for variant in variants):
        face = style.MUTED if collective == "one-shot" else style.PAPER
        marker = _MARKERS.get(collective, "D")
        handle = Line2D([], [], color=style.MUTED, marker=marker, linewidth=0, label=collective)
        handle.set_markerfacecolor(face)
        handles.append(handle)
    made.legend(
        handles=handles,
        loc="outside upper left",
        ncols=_LEGEND_COLUMNS,
        frameon=False,
        fontsize=7.5,
        handletextpad=0.1,
        columnspacing=1.2,
    )


def _caption(panels: list[tuple[ResultFile, Text]]) -> str:
    lengths = sorted({text.seq_length for _, text in panels})
    caption = (
        "Lower and further left is better. Bars: one standard error over sequences of "
        f"{' or '.join(map(str, lengths))} tokens. Lines join the versions of one codec. "
        "Two-shot quantizes the sum, too, and sends fewer bytes at the same bits a value."
    )
    if any((_noise(text, metric) or 0) > _LEAST for _, text in panels for metric in style.METRICS):
        caption += (
            " The dotted line is what codec bf16, with nothing quantized, scores, plus its error: "
            "differences below it mean nothing."
        )
    each = [_hidden(file.data, text) for file, text in panels]
    hidden = list(dict.fromkeys(one for some in each for one in some))
    return caption + (f" Not on a log axis: {', '.join(hidden)}." if hidden else "")


def _hidden(evaluation: Evaluation, text: Text) -> list[str]:
    """Results that the plot cannot show, in words."""
    return [
        f"{result.variant} ({word} {'not finite' if value is None else f'{value:.4f}'})"
        for word, metric in (("loss", "delta_nll"), ("KL", "kl"))
        for result in text.results
        if result.variant != style.REFERENCE
        and ((value := getattr(result, metric)) is None or value <= _LEAST)
    ]
