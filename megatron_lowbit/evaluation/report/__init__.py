"""The report: one HTML page, and PNG plots beside it, from a calibration index and evaluations."""

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
