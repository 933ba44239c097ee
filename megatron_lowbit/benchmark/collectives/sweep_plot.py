"""A plot of a sweep: speedup against message size, a panel per number of ranks and link."""

from pathlib import Path
from typing import Any

from megatron_lowbit.benchmark.collectives.sweep_plan import SCATTERS
from megatron_lowbit.benchmark.collectives.sweep_report import by_variant
from megatron_lowbit.benchmark.plots import save
from megatron_lowbit.comm.policy.timings import size_text

# Colour says the codec, marker and dash the collective. Ours is strong, the others are light; the
# colours (Okabe and Ito) can be told apart without red and green.
_OURS = "rotated-hybrid"
_COLORS = {
    _OURS: "#0072B2",
    "static-hybrid": "#D55E00",
    "int4-g32": "#009E73",
    "fp8-g256": "#CC79A7",
    "int8-token": "#E69F00",
    "native": "#888888",
}
_MORE_COLORS = ("#56B4E9", "#000000", "#8C510A", "#762A83")
_DASHES = {"one-shot": "-", "two-shot": "--", "hierarchical": "-.", "reduce-scatter": ":"}
_MARKERS = {"one-shot": "o", "two-shot": "s", "hierarchical": "D", "reduce-scatter": "v"}
_LEAST, _MOST = 1 / 16, 16  # speedups that are drawn; outside of them a case is at the edge


def draw(rows: list[dict], path: Path) -> None:
    """Draw the rows of one or more sweeps into `path`, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranks = sorted({row["ranks"] for row in rows})
    links = list(dict.fromkeys(row["link"] for row in rows))
    names = list(by_variant(rows))
    figure = Figure(figsize=(1.2 + 4.2 * len(ranks), 1.5 + 3.6 * len(links)), dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(links), len(ranks), sharex=True, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for line, link in zip(grid, links, strict=True):
        for axes, count in zip(line, ranks, strict=True):
            mine = [r for r in rows if r["ranks"] == count and r["link"] == link]
            handles |= _panel(axes, mine, f"{count} ranks, {link}", names)
        line[0].set_ylabel("speedup against native BF16")
    for axes in grid[-1]:
        axes.set_xlabel("message, bytes of BF16")
    _legend(figure, handles)
    save(figure, path, bbox_inches="tight")


def _panel(axes, rows: list[dict], title: str, names: list[str]) -> dict:
    handles = {}
    for name, mine in by_variant(rows).items():
        if mine[0]["codec"] == "native bf16":
            continue  # the line at 1
        mine = sorted(mine, key=lambda row: row["bytes"])
        speedups = [min(max(row["speedup"], _LEAST), _MOST) for row in mine]
        style = _style(mine[0], names)
        (handles[name],) = axes.plot([row["bytes"] for row in mine], speedups, **style)
    axes.axhline(1, color="black", linewidth=1.5, zorder=1.5)
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    sizes = sorted({row["bytes"] for row in rows})
    axes.set_xticks(sizes, [size_text(size) for size in sizes], rotation=45, ha="right", fontsize=8)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def _style(row: dict, names: list[str]) -> dict:
    """How a variant's line looks: the same in every panel."""
    codec, by = row["codec"].split(" ")[0], row["collective"]
    ours = codec == _OURS
    color = _COLORS.get(codec, _MORE_COLORS[names.index(by_variant([row]).popitem()[0]) % 4])
    style = {"color": color, "linewidth": 1.8 if ours else 1.2, "alpha": 1 if ours else 0.85}
    style |= {"linestyle": _DASHES.get(by, "-"), "marker": _MARKERS.get(by, ""), "markersize": 4}
    if "+" in row["codec"]:  # other bits for the sum: the same colour, open markers
        style |= {"markerfacecolor": "white", "linewidth": 1.2}
    if by == "auto":  # under the lines of those that it takes
        style |= {"linewidth": 6, "alpha": 0.25, "zorder": 0, "solid_capstyle": "round"}
    if codec == "native":
        style |= {"linestyle": ":" if by not in SCATTERS else "-", "linewidth": 1.6}
    return style


def _legend(figure, handles: dict) -> None:
    """Under the panels: ours first, in columns."""
    order = sorted(handles, key=lambda n: (n.startswith("native"), not n.startswith(_OURS)))
    handles = {name: handles[name] for name in order}
    figure.tight_layout()
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        ncols=min(3, len(handles)),
        frameon=False,
        fontsize=9,
        handlelength=3.5,
    )
