"""Silence for Megatron's chatter. Set MEGATRON_LOWBIT_VERBOSE=1 to see it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what Megatron prints, logs and warns, unless MEGATRON_LOWBIT_VERBOSE=1.

    Errors still come out as exceptions. Log handlers that Megatron installs meanwhile are removed.
    """
    if os.environ.get("MEGATRON_LOWBIT_VERBOSE") == "1":
        yield
        return
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:], root.level = handlers, level
        logging.disable(disabled)
