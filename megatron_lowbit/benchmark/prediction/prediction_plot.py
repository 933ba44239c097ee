"""A map of winners: for each link the fastest collective over message size and ranks.

matplotlib is needed for this alone.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from megatron_lowbit.benchmark.plots import check_plot, save
from megatron_lowbit.benchmark.prediction.cost_model import Message
from megatron_lowbit.benchmark.prediction.hardware import (
    LINKS,
    MODELS,
    NODE_SIZE,
    payload_bytes,
)
from megatron_lowbit.benchmark.prediction.prediction import (
    BATCHES,
    COLLECTIVES,
    PROMPTS,
    TP_SIZES,
    best_of,
    times,
)
from megatron_lowbit.benchmark.prediction.prediction_report import size
from megatron_lowbit.comm.policy.timings import BF16_BYTES

# Safe for colour-blind readers (Okabe and Ito); native is grey.
_COLORS = ("#b8b8b8", "#0072b2", "#009e73", "#cc79a7", "#e69f00")
_NAMES = {
    "hierarchical": "hierarchical, BF16 in nodes",
    "hierarchical-low": "hierarchical, low bits in nodes, too",
}
_SIZES = [1 << exponent for exponent in range(13, 31)]  # bytes of BF16: 8 KB to 1 GB
_MODEL = MODELS["70b"]
_FULL = 3.5  # the speedup of the full color


def plot(path: Path, *, links: Sequence[str], bits: tuple[int, int]) -> None:
    """Draw the map of each link, at bits of a partial and of the sum, into one file.

    Raises:
        LowbitError: See `plots.check_plot`.
    """
    from matplotlib.figure import Figure

    check_plot(path)
    columns = min(len(links), 3)
    rows = math.ceil(len(links) / columns)
    figure = Figure(figsize=(max(6.2 * columns, 8.5), 2.9 * rows + 1.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    seen = {"native"}
    for ax, link in zip(axes, links, strict=False):
        seen |= _map(ax, link, bits)
    for ax in axes[len(links) :]:
        ax.set_axis_off()
    _explain(figure, bits, seen)
    save(figure, path, dpi=110)


def _map(ax, link: str, bits: tuple[int, int]) -> set[str]:
    """One link: a cell for each size and number of ranks; the collectives that win anywhere."""
    seen = set()
    payload = payload_bytes(_MODEL.hidden, bits)
    ranks = [n for n in TP_SIZES if LINKS[link].inside is not None or n <= NODE_SIZE]
    for y, n in enumerate(ranks):
        for x, count in enumerate(_SIZES):
            seconds = times(link, Message(count // BF16_BYTES, n, *payload))
            seen.add(_cell(ax, x, y, seconds))
    ax.set_xlim(-0.5, len(_SIZES) - 0.5)
    ax.set_ylim(-0.5, len(ranks) - 0.5)
    ticks = range(0, len(_SIZES), 3)
    ax.set_xticks(ticks, [size(_SIZES[x]) for x in ticks])
    ax.set_yticks(range(len(ranks)), [str(n) for n in ranks])
    if ranks[-1] > NODE_SIZE:
        ax.axhline(ranks.index(NODE_SIZE) + 0.5, color="black", linewidth=1.2)
    ax.set_title(_title(link), fontsize=10)
    ax.set_ylabel("ranks")
    _mark(ax, "decode", [n * _MODEL.hidden * BF16_BYTES for n in BATCHES])
    _mark(ax, "prefill", [n * _MODEL.hidden * BF16_BYTES for n in PROMPTS])
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    return seen


def _cell(ax, x: int, y: int, seconds: dict[str, float]) -> str:
    best = best_of(seconds)
    speedup = seconds["native"] / seconds[best]
    alpha = 0.45 if best == "native" else min(0.25 + 0.75 * (speedup - 1) / (_FULL - 1), 1.0)
    color = _COLORS[COLLECTIVES.index(best)]
    ax.fill_between([x - 0.48, x + 0.48], y - 0.46, y + 0.46, color=color, alpha=alpha, lw=0)
    if best != "native":
        dark = "white" if alpha > 0.75 and best in ("one-shot", "two-shot") else "black"
        ax.text(x, y, f"{speedup:.1f}", ha="center", va="center", fontsize=7, color=dark)
    return best


def _mark(ax, name: str, sizes: list[int]) -> None:
    """A bar under the axis: the sizes of a 70B model's messages."""
    first, last = (math.log2(sizes[i] / _SIZES[0]) for i in (0, -1))
    where = ax.get_xaxis_transform()
    ax.plot([first, last], [-0.17, -0.17], color="black", lw=2, transform=where, clip_on=False)
    middle = (first + last) / 2
    ax.text(middle, -0.21, name, transform=where, ha="center", va="top", fontsize=8)


def _title(link: str) -> str:
    found = LINKS[link]
    title = f"{link}, {found.bandwidth / 1e9:g} GB/s each way, {found.card.name}"
    if found.inside is None:
        return title
    nics = f"{found.nics} NIC{'s' if found.nics > 1 else ''}"
    return f"{title}\nabove the line: nodes of {NODE_SIZE}, {found.inside} inside, {nics} a node"


def _explain(figure, bits: tuple[int, int], seen: set[str]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=color, label=_NAMES.get(name, name))
        for name, color in zip(COLLECTIVES, _COLORS, strict=True)
        if name in seen
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(
        f"Predicted, not measured: fastest all-reduce and its speedup over native BF16 at "
        f"{bits[0]}+{bits[1]} bits, by message size (BF16) and ranks\n"
        "bars: messages of a 70B model in decode (batch 1-64) and prefill (2k-32k tokens)",
        fontsize=11,
    )
