"""Tasks: what is kept of native's accuracy. Long contexts: loss and KL by position."""

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from megatron_lowbit.evaluation.evaluation_schema import (
    AverageResult,
    LongContext,
    LongContextResult,
)
from megatron_lowbit.evaluation.report import style
from megatron_lowbit.evaluation.report.labels import label_ends
from megatron_lowbit.evaluation.report.results import ResultFile


def draw_tasks(name: str, files: list[ResultFile]) -> style.Plot | None:
    """A panel an evaluation, a line a codec; None if no average was measured."""
    files = [file for file in files if file.data.task_average and _known(file)]
    if not files:
        return None
    codecs = _order(files)
    with style.figure(1.0 + 0.24 * len(codecs)) as made:
        grid = made.subplots(1, len(files), sharey=True, sharex=True, squeeze=False)[0]
        for axes, file in zip(grid, files, strict=True):
            _task_panel(axes, file, codecs)
        return style.finish(
            made,
            name,
            "Share of native BF16's average accuracy that is kept, with its 95 % confidence "
            "interval. An interval that holds 100 % shows no difference from native.",
        )


def _known(file: ResultFile) -> list[AverageResult]:
    average = file.data.task_average
    return [result for result in average.results if result.kept is not None] if average else []


def _order(files: list[ResultFile]) -> list[str]:
    """Codecs, worst first as the y axis goes up: by the first evaluation that has them."""
    kept: dict[str, float] = {}
    for file in files:
        for result in _known(file):
            assert result.kept is not None, "see `_known`"
            kept.setdefault(result.variant, result.kept)
    return sorted(kept, key=lambda codec: kept[codec])


def _task_panel(axes: Axes, file: ResultFile, codecs: list[str]) -> None:
    for result in _known(file):
        at, color = codecs.index(result.variant), style.color_of(result.variant)
        if result.kept_low is not None and result.kept_high is not None:
            ends = [100 * result.kept_low, 100 * result.kept_high]
            axes.plot(ends, [at, at], color=color, linewidth=2)
        assert result.kept is not None, "see `_known`"
        axes.plot(100 * result.kept, at, color=color, marker="o", markersize=6)
    axes.axvline(100, color=style.MUTED, linewidth=1.1, linestyle=(0, (2, 2)), zorder=1)
    axes.set_yticks(range(len(codecs)), codecs)
    axes.set_ylim(-0.6, len(codecs) - 0.4)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel("of native's average accuracy")
    axes.set_title(f"{file.label}: average of {len(file.data.tasks)} tasks")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def draw_long_context(name: str, file: ResultFile, measured: LongContext) -> style.Plot | None:
    """Two panels, a line a codec with its label at the right; None without a bucket's value."""
    results = [result for result in measured.results if any(_curve(measured, result.kl))]
    if not measured.buckets or not results:
        return None
    with style.figure(4.4) as made:
        grid = made.subplots(1, 2)
        made.get_layout_engine().set(rect=(0, 0, 0.87, 1), wspace=0.33)
        ends = {}
        for axes, (metric, title) in zip(grid, style.METRICS.items(), strict=True):
            ends[axes] = _position_panel(axes, measured, results, metric)
            axes.set_title(title)
            axes.set_xlabel("position in the text, tokens")
        style.freeze(made)
        for axes, labels in ends.items():
            label_ends(axes, labels)
        return style.finish(
            made,
            name,
            f"{file.label}: {measured.sequences} sequences of {measured.name}, by position (each "
            "point is a bucket, at its middle). A line that rises says that errors grow with the "
            "context. Values of zero or less have no place on a log axis and are left out.",
        )


def _curve(measured: LongContext, values: list[float | None]) -> list[tuple[float, float]]:
    """Middle of the bucket and value, where there is one above zero."""
    return [
        ((low + high) / 2, value)
        for (low, high), value in zip(measured.buckets, values, strict=True)
        if value is not None and value > 0
    ]


def _position_panel(
    axes: Axes, measured: LongContext, results: list[LongContextResult], metric: str
):
    ends = []
    for result in results:
        curve = _curve(measured, getattr(result, metric))
        if not curve:
            continue
        color = style.color_of(result.variant)
        dash = (0, (2, 2)) if result.variant == style.REFERENCE else "-"
        axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.3, linestyle=dash)
        axes.plot(*zip(*curve, strict=True), ".", color=color, markersize=4)
        ends.append((curve[-1][1], color, result.variant))
    style.log_axis(axes)
    end = measured.buckets[-1][1]
    axes.set_xticks([quarter * end // 4 for quarter in range(4)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlim(measured.buckets[0][0], sum(measured.buckets[-1]) / 2)
    return ends
