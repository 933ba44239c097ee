"""The page: what it is made of, and how it and its PNGs are written."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.report.style import FAMILIES, INK, MUTED, PAPER, Plot, family_of
from megatron_lowbit.files import atomic_directory, check_output, flush, write

_TEMPLATE = "page.html.j2"
# Columns that are no numbers.
_TEXT = (
    "by",
    "written",
    "tensor parallel size",
    "text",
    "sync point",
    "layers",
    "codec",
    "worst sync point",
    "worst token",
    "model",
)

NOT_MEASURED = "Not measured."


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: Above it.
        head: The columns.
        rows: Text, in as many columns; where the first is a codec, it gets its family's colour.
        words: The last column is words, not a number.
        is_folded: The reader unfolds it: it is long, and seldom wanted.
    """

    caption: str
    head: list[str]
    rows: list[list[str]]
    words: bool = False
    is_folded: bool = False

    def is_text(self, column: int) -> bool:
        """Whether a column is to be aligned as text."""
        return (
            column == 0
            or self.head[column] in _TEXT
            or (self.words and column == len(self.head) - 1)
        )


@dataclass(frozen=True)
class Paragraph:
    """A paragraph: plain, a heading, the large one on top, a warning, or code."""

    text: str
    look: Literal["plain", "heading", "lead", "warning", "code"] = "plain"


Block = Paragraph | Table | Plot


@dataclass(frozen=True)
class Section:
    """A part of the page, with the name that links to it."""

    name: str
    title: str
    blocks: list[Block]


def plots_directory(output: Path) -> Path:
    """Where the PNGs of a report go: ``report_plots`` beside ``report.html``."""
    return output.with_name(f"{output.stem}_plots")


def check_destination(output: Path) -> None:
    """Raise if a report cannot be written to `output`: before the work, not after.

    Raises:
        LowbitError: It is no .html file, or the folder of the plots holds other things, which
            writing would remove.
        OSError: The place cannot be written to.
    """
    if output.suffix != ".html" or output.is_dir():
        raise LowbitError(f"--output {output} is not the name of an .html file")
    plots = plots_directory(output)
    if plots.exists() and not (
        plots.is_dir() and all(file.suffix == ".png" for file in plots.iterdir())
    ):
        raise LowbitError(
            f"{plots}, where the plots go, holds other things than plots: name another --output"
        )
    check_output(output)


def render(title: str, sections: list[Section]) -> str:
    """The page: one file that needs no other."""
    environment = Environment(
        loader=PackageLoader("megatron_lowbit.evaluation.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    environment.filters["family"] = family_of
    return environment.get_template(_TEMPLATE).render(
        title=title,
        sections=sections,
        families=FAMILIES,
        day={"ink": INK, "muted": MUTED, "paper": PAPER},
    )


def write_report(title: str, sections: list[Section], output: Path) -> list[Path]:
    """Write the PNGs and the page, all of them or none.

    Returns:
        What was written, the page first.
    """
    check_destination(output)
    # What the command line has that is no Unicode, such as a file's name, is shown as escapes.
    page = render(title, sections).encode(errors="backslashreplace")
    plots = [block for section in sections for block in section.blocks if isinstance(block, Plot)]
    directory = plots_directory(output)
    staged = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    try:
        with atomic_directory(directory) as staging:
            for plot in plots:
                write(staging / f"{plot.name}.png", plot.png)
            write(staged, page)
            flush(staged)
        os.replace(staged, output)
    finally:
        staged.unlink(missing_ok=True)
    return [output, *(directory / f"{plot.name}.png" for plot in plots)]
