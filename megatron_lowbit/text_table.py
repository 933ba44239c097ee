"""Tables for a terminal and for Markdown pages: rows of texts, in columns of equal width."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1, gap: str = "  ") -> list[str]:
    """Rows as lines of text.

    Args:
        rows: Of equal length; a head is one of them.
        left: How many of the first columns begin at the left; numbers behind them end at the right.
        gap: What is between two columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        texts = [text.ljust(w) if n < left else text.rjust(w) for n, (text, w) in cells]
        lines.append(gap.join(texts))
    return lines


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int | None = None) -> str:
    """A Markdown table, all of it at the left where `left` is not given (see `aligned`)."""
    left = len(head) if left is None else left
    rule = [*["---"] * left, *["---:"] * (len(head) - left)]
    return "\n".join(f"| {line} |" for line in aligned([head, rule, *rows], left=left, gap=" | "))
