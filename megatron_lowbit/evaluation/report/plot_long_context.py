"""Loss and KL against the position in a long text: a figure a text and evaluation."""

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_lowbit.evaluation.report import style
from megatron_lowbit.evaluation.report.labels import label_ends
from megatron_lowbit.evaluation.report.results import LongContext, LongContextResult, ResultFile

_METRICS = {"delta_nll": "loss above native, nats a token", "kl": "KL from native, nats a token"}
_REFERENCE = "bf16"


def draw(name: str, file: ResultFile, measured: LongContext) -> style.Plot | None:
    """Two panels, a line a codec with its label at the right; None without a bucket's value."""
    results = [result for result in measured.results if any(_curve(measured, result.kl))]
    if not measured.buckets or not results:
        return None
    with style.figure(4.4) as made:
        grid = made.subplots(1, 2)
        made.get_layout_engine().set(rect=(0, 0, 0.87, 1), wspace=0.33)
        ends = {}
        for axes, (metric, title) in zip(grid, _METRICS.items(), strict=True):
            ends[axes] = _panel(axes, measured, results, metric)
            axes.set_title(title)
            axes.set_xlabel("position in the text, tokens")
        style.freeze(made)
        for axes, labels in ends.items():
            label_ends(axes, labels)
        return style.finish(
            made,
            name,
            f"{file.label}: {measured.name}, by position (each point is a bucket, at its middle). "
            "A line that rises says that errors grow with the context. Values of zero or less "
            "have no place on a log axis and are left out.",
        )


def _curve(measured: LongContext, values: list[float | None]) -> list[tuple[float, float]]:
    """Middle of the bucket and value, where there is one above zero."""
    return [
        ((low + high) / 2, value)
        for (low, high), value in zip(measured.buckets, values, strict=True)
        if value is not None and value > 0
    ]


def _panel(axes: Axes, measured: LongContext, results: list[LongContextResult], metric: str):
    ends = []
    for result in results:
        curve = _curve(measured, getattr(result, metric))
        if not curve:
            continue
        color = style.color_of(result.codec)
        dash = (0, (2, 2)) if result.codec == _REFERENCE else "-"
        axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.3, linestyle=dash)
        axes.plot(*zip(*curve, strict=True), ".", color=color, markersize=4)
        ends.append((curve[-1][1], color, result.codec))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlim(measured.buckets[0][0], sum(measured.buckets[-1]) / 2)
    return ends
