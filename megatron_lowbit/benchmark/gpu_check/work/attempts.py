"""Cases one after the other: what is wrong with one does not hide the next."""

import time
from collections.abc import Callable, Iterable

import torch

from megatron_lowbit.benchmark.gpu_check.stage_tasks import Row, Rows, words
from megatron_lowbit.errors import LowbitError

# What a case is called, and what checks it; that may give more for its row.
Case = tuple[str, Callable[[], Row | None]]


def attempts(cases: Iterable[Case], device: torch.device | str) -> Rows:
    """A row for each case, with its seconds or its error.

    Raises:
        LowbitError: An error has broken the GPU's context: every later call would fail by it.
    """
    on = torch.device(device)
    for name, call in cases:
        began = time.monotonic()
        try:
            found = call()
            _wait(on)
        except Exception as error:  # whatever torch, Triton or the driver raise
            yield {"case": name, "error": words(error)}
            _check_alive(on, name)
        else:
            yield {"case": name, "seconds": round(time.monotonic() - began, 3), **(found or {})}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_alive(device: torch.device, name: str) -> None:
    try:
        _wait(device)
    except Exception as error:
        raise LowbitError(f"nothing was done behind {name}: {words(error)}") from None
