"""What a page is made of."""

from dataclasses import dataclass
from typing import Literal

from megatron_lowbit.evaluation.report.style import Plot
from megatron_lowbit.evaluation.report.tables import Table

NOT_MEASURED = "Not measured."


@dataclass(frozen=True)
class Paragraph:
    """A paragraph: plain, a heading, the large one on top, a warning, or code."""

    text: str
    look: Literal["plain", "heading", "lead", "warning", "code"] = "plain"


@dataclass(frozen=True)
class Folded:
    """A table that the reader unfolds: long, and seldom wanted."""

    table: Table


Block = Paragraph | Table | Folded | Plot


@dataclass(frozen=True)
class Section:
    """A part of the page, with the name that links to it."""

    name: str
    title: str
    blocks: list[Block]
