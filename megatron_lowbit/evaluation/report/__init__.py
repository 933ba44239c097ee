"""The report: one HTML page, and PNG plots beside it, from a calibration index and evaluations.

results.py       reads evaluation files
index_reader.py  what the calibration index says of a sync point: ranges, outliers, recipe
findings.py      what follows from the numbers: the best codec, the sync points that stand out
page_tables.py   numbers as text
style.py         colours, families, one figure as SVG and as PNG
labels.py        labels that do not cover each other
plot_*.py        the plots
sections.py      what the page says, in order
page.py          what it is made of, the page from `page.html.j2`, and the files
"""

from megatron_lowbit.errors import LowbitError


def require() -> None:
    """Raise one clear error if a package of the extra is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
        import pydantic  # noqa: F401
    except ModuleNotFoundError as error:
        raise LowbitError(
            f'the report needs {error.name}: pip install "megatron_lowbit[report]"'
        ) from None
