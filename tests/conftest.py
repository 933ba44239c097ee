"""The order in which files of tests run."""

from pathlib import Path

import pytest

SLOW = [Path(__file__).parent / name for name in ("kernels", "integration")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow files first: two workers then end together, on many quick tests."""
    items.sort(key=lambda item: not any(item.path.is_relative_to(slow) for slow in SLOW))
