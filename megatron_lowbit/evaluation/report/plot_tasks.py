"""Share of native's average accuracy that each codec keeps, with its confidence interval."""

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from megatron_lowbit.evaluation.report import style
from megatron_lowbit.evaluation.report.results import AverageResult, ResultFile


def draw(name: str, files: list[ResultFile]) -> style.Plot | None:
    """A panel an evaluation, a line a codec; None if no average was measured."""
    files = [file for file in files if file.data.task_average and _known(file)]
    if not files:
        return None
    codecs = _order(files)
    with style.figure(1.0 + 0.24 * len(codecs)) as made:
        grid = made.subplots(1, len(files), sharey=True, sharex=True, squeeze=False)[0]
        for axes, file in zip(grid, files, strict=True):
            _panel(axes, file, codecs)
        return style.finish(
            made,
            name,
            "Share of native BF16's average accuracy that is kept, with its 95 % confidence "
            "interval. An interval that holds 100 % shows no difference from native.",
        )


def _known(file: ResultFile) -> list[AverageResult]:
    return [result for result in file.data.task_average.results if result.kept is not None]


def _order(files: list[ResultFile]) -> list[str]:
    """Codecs, worst first as the y axis goes up: by the first evaluation that has them."""
    kept: dict[str, float] = {}
    for file in files:
        for result in _known(file):
            kept.setdefault(result.codec, result.kept)
    return sorted(kept, key=lambda codec: kept[codec])


def _panel(axes: Axes, file: ResultFile, codecs: list[str]) -> None:
    for result in _known(file):
        at, color = codecs.index(result.codec), style.color_of(result.codec)
        if result.kept_low is not None and result.kept_high is not None:
            ends = [100 * result.kept_low, 100 * result.kept_high]
            axes.plot(ends, [at, at], color=color, linewidth=2)
        axes.plot(100 * result.kept, at, color=color, marker="o", markersize=6)
    axes.axvline(100, color=style.MUTED, linewidth=1.1, linestyle=(0, (2, 2)), zorder=1)
    axes.set_yticks(range(len(codecs)), codecs)
    axes.set_ylim(-0.6, len(codecs) - 0.4)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel("of native's average accuracy")
    axes.set_title(f"{file.label}: average of {len(file.data.tasks)} tasks")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
