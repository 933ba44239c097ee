"""The order in which files of tests run, and what a shell must not change for them."""

import signal
from pathlib import Path

import pytest

SLOW = [Path(__file__).parent / name for name in ("kernels", "integration")]

# A shell starts what it puts in the background with SIGINT ignored, and tools started by tests
# would inherit that: none of them could be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow files first: two workers then end together, on many quick tests."""
    items.sort(key=lambda item: not any(item.path.is_relative_to(slow) for slow in SLOW))
