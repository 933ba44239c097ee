"""A Megatron checkpoint's directory: whether it is one, and what goes wrong when it is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor
from torch.nn import functional

from megatron_lowbit.errors import LowbitError

TRACKER = "latest_checkpointed_iteration.txt"


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, elementwise."""
    return functional.gelu(x, approximate="tanh")


# What stands between the MLP's gate and its product with `up`, by the name that a converted
# checkpoint has of it: transformers'.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_pytorch_tanh": gelu_tanh,
}


@contextlib.contextmanager
def reading_checkpoint(load: str) -> Iterator[None]:
    """Turns what Megatron and torch raise for damaged files into one line with their name."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        raise LowbitError(f"--load {load}: a damaged checkpoint ({failure!r})") from error
    except SystemExit as error:  # with status 0: it has printed why, and `quiet` drops that
        raise LowbitError(
            f"--load {load}: Megatron cannot read it; MEGATRON_LOWBIT_VERBOSE=1 shows why"
        ) from error
    except (CheckpointingException, AssertionError) as error:
        raise LowbitError(f"--load {load}: not a whole checkpoint ({error})") from error


def check_checkpoint_dir(load: str) -> None:
    """Raises LowbitError unless `load` is a directory that holds a complete checkpoint."""
    if not Path(load).is_dir():
        raise LowbitError(f"--load {load}: no such directory")
    if not (Path(load) / TRACKER).is_file():
        raise LowbitError(f"--load {load}: not a Megatron checkpoint, it has no {TRACKER}")
