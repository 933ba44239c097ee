"""What all plots of benchmarks need: what lacks is found out before the work, and not after it."""

import io
from pathlib import Path

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import check_output, write_atomic

_ENDINGS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise unless a plot can be drawn and written to `path` of ``--plot``.

    Raises:
        LowbitError: matplotlib is missing, the ending is another, or see `files.check_output`.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise LowbitError(
            'a plot needs matplotlib: pip install "megatron_lowbit[bench]", or leave out --plot'
        ) from None
    if path.suffix not in _ENDINGS:
        raise LowbitError(f"--plot {path}: give a name that ends in {', '.join(_ENDINGS)}")
    check_output(path, "--plot")


def save(figure, path: Path, **how) -> None:
    """Write a figure, whole or not at all; the ending of `path` says the format."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], **how)
    write_atomic(path, drawn.getvalue())
