"""`MEGATRON_LOWBIT_CHECK=1`: do all ranks of a group make the same call? Asked before each message.

Ranks that differ (another shape, codec, table, collective) do not fail: bytes of one size are read
as another's, and a sum is garbage. With the switch on every call of `all_reduce`, `reduce_scatter`
and `all_gather`, native ones too, first gathers a small header from all ranks of its group:

    collective  all_reduce, reduce_scatter or all_gather, and the way that this message goes
    shape       of the tensor
    dtype       of the tensor
    codec       its name and bits
    tables      the first digits of a digest of all their values
    counts      of reduce_scatter
    feedback    whether there is error feedback

Where ranks differ in one, all of them raise the same `LowbitError`, which names the ranks and the
values. An argument that is wrong on one rank alone ends the others, too.

It is for finding such a fault, and costs two more collectives a message (2 ranks over Gloo, 2 busy
cores: 1.6 ms). Set it on all ranks or on none. Off, the default, it costs the look at one flag.
Inside a CUDA graph's capture nothing can be asked, and nothing is.
"""

import contextlib
import functools
import hashlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.codecs import DEFAULT_CODEC, Tables, get_codec
from megatron_lowbit.comm.agreement import gather_values
from megatron_lowbit.comm.policy.policy import Policy
from megatron_lowbit.errors import LowbitError

CHECK_SWITCH = "MEGATRON_LOWBIT_CHECK"
_CHOICES = {None: False, "": False, "0": False, "1": True}


@functools.cache
def is_checking() -> bool:
    """Whether the switch is on; the environment is read once.

    Raises:
        LowbitError: It is neither 0 nor 1.
    """
    asked = os.environ.get(CHECK_SWITCH)
    if asked not in _CHOICES:
        raise LowbitError(f"{CHECK_SWITCH}={asked}: choose 0 or 1")
    return _CHOICES[asked]


def require_same_call(name: str, x: object, call: dict, group: dist.ProcessGroup) -> None:
    """Raise LowbitError on every rank of `group` unless all make the same call.

    Args:
        name: The public function.
        x: Its tensor, checked by nobody so far.
        call: Its other arguments, by name.
        group: Its group.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    headers = gather_values(_header(name, x, call), group=group)
    ranks = dist.get_process_group_ranks(group)
    differences = [
        f"{field} {_by_value([header.get(field, 'none') for header in headers], ranks)}"
        for field in dict.fromkeys(field for header in headers for field in header)
        if len({header.get(field, "none") for header in headers}) > 1
    ]
    if differences:
        raise LowbitError(
            f"ranks differ in one call: {'; '.join(differences)}; make the same call on all ranks"
        )


def _header(name: str, x: object, call: dict) -> dict[str, str]:
    if not isinstance(x, Tensor):
        return {"collective": name, "tensor": repr(x)[:80]}
    return {
        "collective": f"{name} {_way(name, x, call.get('collective', 'one-shot'))}".rstrip(),
        "shape": str(tuple(x.shape)),
        "dtype": str(x.dtype).removeprefix("torch."),
        "codec": _codec(call.get("codec", DEFAULT_CODEC)),
        "tables": _digest(call.get("tables")),
        "counts": str(call.get("counts")),
        "feedback": str(call.get("feedback") is not None),
    }


def _way(name: str, x: Tensor, collective: object) -> str:
    """What a policy makes of this message, or what the user has named."""
    if name == "all_gather":
        return ""
    if isinstance(collective, Policy):
        return getattr(collective, name)(x.numel()).collective
    return str(collective)[:80]


def _codec(codec: Any) -> str:
    with contextlib.suppress(LowbitError, TypeError):  # it is one, or a mistake of this rank's
        codec = get_codec(codec)
    return repr(codec)[:80]


def _digest(tables: object) -> str:
    if not isinstance(tables, Tables):
        return "none" if tables is None else repr(tables)[:80]
    digest = hashlib.sha256()
    _add(digest, tables)
    return digest.hexdigest()[:12]


def _add(digest, tables: Tables) -> None:
    for name, value in vars(tables).items():
        digest.update(name.encode())
        if isinstance(value, Tables):
            _add(digest, value)
        elif isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(repr(value).encode())


def _by_value(values: list[str], ranks: list[int]) -> str:
    """``(5, 48) on rank 0, 1, (6, 48) on rank 2``."""
    by_value: dict[str, list[str]] = {}
    for value, rank in zip(values, ranks, strict=True):
        by_value.setdefault(value, []).append(str(rank))
    return ", ".join(f"{value} on rank {' and '.join(who)}" for value, who in by_value.items())
