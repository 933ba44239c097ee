"""How the plots look: families and their colours, and one figure as inline SVG and as PNG.

A figure is drawn once, in the colours of a light page. The PNG keeps them; in the SVG each becomes
a CSS variable of the page, so that the same plot is readable on a dark one.
"""

import html
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

INK, MUTED, GRID, PAPER = "#1b1b1a", "#6a6a65", "#e3e3de", "#ffffff"
REFERENCE = "bf16"  # the codec that quantizes nothing
METRICS = {"delta_nll": "loss above native, nats a token", "kl": "KL from native, nats a token"}
WIDTH = 10.0  # inches of a figure: the width of the page
_PNG_DPI = 160


@dataclass(frozen=True)
class Family:
    """Codecs of one kind: their CSS class, what they are, their colour by day and by night."""

    name: str
    title: str
    color: str
    dark: str


# Most light colours are Okabe and Ito's, which can be told apart without red and green; beside them
# two greys and a sand colour for what is only there to compare with. A codec is of the first family
# whose name its own begins with; of none, it is a peer's.
FAMILIES = (
    Family("recipe", "recipe (ours)", "#aa4f87", "#e08fc0"),
    Family("shaped-hybrid", "shaped-hybrid (ours)", "#0072b2", "#3f9fe0"),
    Family("rotated-hybrid", "rotated-hybrid (ours)", "#49a5dc", "#8fd0f7"),
    Family("scaled-hybrid", "scaled-hybrid (ours)", "#7a6fc4", "#a9a0ec"),
    Family("static-hybrid", "static-hybrid (the paper's)", "#d55e00", "#f58a3c"),
    Family("paper-baseline", "the paper's baselines (int4)", "#4a4a4c", "#b9b9bc"),
    Family("bf16", "bf16, nothing quantized", "#8b8b86", "#8c8c87"),
    Family("peer", "peers' schemes", "#009e73", "#2fc79c"),
    Family("try", "candidates that were not kept", "#a89868", "#958a63"),
)
_BY_NAME = {family.name: family for family in FAMILIES}
_BASELINES = ("int4", "int4-random")

_CSS_NAMES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"}
_CSS_NAMES |= {family.color: f"family-{family.name}" for family in FAMILIES}

_RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same widths on every machine
    "font.size": 8.5,
    "text.parse_math": False,  # names are plain text, whatever is in them
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Plot:
    """A finished plot.

    Attributes:
        name: Of its PNG, without the suffix.
        caption: What to see in it, and how it was made.
        svg: An ``<svg>`` element whose colours are CSS variables.
        png: The same in the colours of a light page.
    """

    name: str
    caption: str
    svg: str
    png: bytes


def family_of(codec: str) -> str:
    """The family of a codec, by its name in results: ``rotated-hybrid-4+6`` and the like."""
    if codec.partition("@")[0] in _BASELINES:
        return "paper-baseline"
    mine = (family.name for family in FAMILIES if codec.startswith(family.name))
    return next(mine, "peer")


def color_of(codec: str) -> str:
    """The colour of a codec's family, by day."""
    return _BY_NAME[family_of(codec)].color


def family_dots(codecs: Iterable[str]) -> list[Line2D]:
    """For a legend: a dot for each family that one of `codecs` is of."""
    seen = {family_of(codec) for codec in codecs}
    return [
        Line2D([], [], color=family.color, marker="o", linewidth=0, label=family.title)
        for family in FAMILIES
        if family.name in seen
    ]


@contextmanager
def figure(height: float) -> Iterator[Figure]:
    """A figure of the page's width and `height` inches, to be drawn and finished in the block."""
    with rc_context(_RC):
        made = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=PAPER)
        FigureCanvasAgg(made)
        yield made


def freeze(made: Figure) -> None:
    """Settle where the axes are, for labels that are placed by the pixel."""
    made.draw_without_rendering()
    made.set_layout_engine("none")


def finish(made: Figure, name: str, caption: str) -> Plot:
    """The figure as a `Plot`."""
    png = io.BytesIO()
    made.savefig(png, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    return Plot(name=name, caption=caption, svg=_svg(made, name, caption), png=png.getvalue())


def log_axis(axes: Axes) -> None:
    """A log y axis with ticks that can be read, also where it spans less than a decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def layer_axis(axes: Axes, layers: list[int]) -> None:
    """An x axis of layers, from the first to the last."""
    room = 0.5 if min(layers) == max(layers) else 0
    axes.set_xlim(min(layers) - room, max(layers) + room)
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(visible=False, axis="x")


def _svg(made: Figure, name: str, caption: str) -> str:
    buffer = io.StringIO()
    # Glyphs as paths: the labels were placed by these widths.
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        made.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    for color, css in _CSS_NAMES.items():
        text = text.replace(color, f"var(--{css})")
    # Ids are unique in a page, and every plot names its glyphs alike.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(caption)}" ', 1)
