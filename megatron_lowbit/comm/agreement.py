"""Steps that succeed on all ranks or fail on all ranks with the same message."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_lowbit.errors import LowbitError

T = TypeVar("T")


def on_every_rank(step: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
    """Run `step` on each rank; if it fails on any, raise on all, so that none waits for ever.

    Args:
        step: Local work, no collectives inside.
        group: The ranks that must agree; all if left out. Without torch.distributed, this rank.

    Raises:
        LowbitError: `step` raised a `ValueError` or `OSError` on some rank; the message is the
            first such rank's.
    """
    failure: str | None = None
    try:
        result = step()
    except (ValueError, OSError) as error:
        failure = str(error)
        if not dist.is_initialized():
            raise
    if dist.is_initialized():
        failures = gather_values(failure, group=group)
        for rank, text in enumerate(failures):
            if text is not None:
                where = "" if all(failures) else f" (found by rank {rank})"
                raise LowbitError(text + where)
    return result


def require_equal(what: str, value: object, *, group: dist.ProcessGroup | None = None) -> None:
    """Raise LowbitError on every rank if `value` is not the same on all; `what` names it."""
    values = gather_values(value, group=group)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise LowbitError(
                f"ranks differ in their {what}: rank 0 has {values[0]}, rank {rank} has {other}; "
                "give all ranks the same"
            )


def require_some(found: object, failure: str, *, group: dist.ProcessGroup | None = None) -> None:
    """Raise LowbitError on every rank, in rank 0's words, if `found` is empty or false on all."""
    failures = gather_values(None if found else failure, group=group)
    if all(failures):
        raise LowbitError(failures[0])


def gather_values(value: object, *, group: dist.ProcessGroup | None = None) -> list:
    """Every rank's `value`, in rank order."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
