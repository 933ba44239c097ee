"""A model's partials in a file: what all ranks would sum at a few sync points, and the tables.

A safetensors file: for each sync point, in the order of the model, ``N.partials``, BF16 ``[ranks,
tokens, hidden]``, and the tensors of its tables; the metadata has the names and the digests of what
plain torch made of them where they were saved.
"""

import ctypes
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.codecs import Tables, get_codec
from megatron_lowbit.codecs.carry import Carry
from megatron_lowbit.errors import LowbitError

Made = dict[str, Tensor]  # what a sync point gives, by names
CODEC, BITS = "shaped-hybrid", (4, 4)
MOST_BYTES = 40_000_000
_TABLES = ("bf16_index", "encode_scale", "decode_scale", "center", "center_sum")
_REMEDY = "save it again by tools/gpu_check.sh --save-partials CKPT"


@dataclass(frozen=True)
class Saved:
    """The sync points of a file.

    Attributes:
        names: Of the sync points.
        partials: BF16 ``[ranks, tokens, hidden]`` of each.
        tables: Of each, on the CPU.
        digests: Of what `chain` gives at each; none if it is of other tokens.
    """

    names: list[str]
    partials: list[Tensor]
    tables: list[Tables]
    digests: list[str]

    def only(self, *, points: int, tokens: int) -> "Saved":
        """The first tokens of the first sync points."""
        few = [x[:, :tokens] for x in self.partials[:points]]
        return Saved(self.names[:points], few, self.tables[:points], [])


def chain(saved: Saved, device: torch.device | str) -> Iterator[Made]:
    """Send all ranks' partials one-shot and two-shot, each sync point taking what the last gave.

    Returns:
        At each sync point the payloads, sums and carries by their names.
    """
    codec = get_codec(CODEC, bits=BITS)
    ranks, tokens, hidden = saved.partials[0].shape
    owed = torch.zeros(ranks, tokens, hidden, dtype=torch.bfloat16, device=device)
    owed_sum = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device=device)
    for partials, on_cpu in zip(saved.partials, saved.tables, strict=True):
        tables, given, given_sum = on_cpu.to(device), torch.empty_like(owed), owed_sum.clone()
        payloads = torch.stack(
            [
                codec.encode_with_carry(x, tables, Carry(owed[r], given[r]), rank=r)
                for r, x in enumerate(partials.to(device))
            ]
        )
        summed = codec.reduce_encode_with_carry(payloads, tables, Carry(owed_sum, given_sum))
        total = torch.empty_like(owed_sum)
        codec.for_sum().decode_sum(summed[None], codec.sum_tables(tables), out=total)
        one_shot = codec.decode_sum(payloads, tables)
        yield {"payloads": payloads, "sum": one_shot, "two-shot sum": total, "carries": given} | {
            "payload of the sum": summed,
            "carry of the sum": given_sum,
        }
        owed, owed_sum = given, given_sum


def digest(made: Made) -> str:
    """sha256 of what `chain` gave at a sync point."""
    found = hashlib.sha256()
    for name in sorted(made):
        found.update(name.encode())
        values = made[name].cpu().contiguous()
        found.update(ctypes.string_at(values.data_ptr(), values.nbytes))  # needs no NumPy
    return found.hexdigest()


def tensors(saved: Saved) -> dict[str, Tensor]:
    """What the file has: names as the module says."""
    found = {}
    for place, (partials, tables) in enumerate(zip(saved.partials, saved.tables, strict=True)):
        found[f"{place}.partials"] = partials.contiguous()
        for field in _TABLES:
            value = getattr(tables, field)
            assert value is not None, f"{CODEC} has {field}"
            found[f"{place}.{field}"] = value.contiguous()
    return found


def metadata(saved: Saved) -> dict[str, str]:
    """Of the file."""
    return {"points": json.dumps(saved.names), "digests": json.dumps(saved.digests)}


def load(path: Path) -> Saved:
    """Read a file.

    Raises:
        LowbitError: It is damaged or something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names, digests = json.loads(about["points"]), json.loads(about["digests"])
        partials = [found[f"{place}.partials"] for place in range(len(names))]
        tables = [_tables(found, place) for place in range(len(names))]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise LowbitError(f"{path} has no saved partials ({reason}): {_REMEDY}") from None
    if not names or len(digests) != len(names) or len({x.shape for x in partials}) != 1:
        raise LowbitError(f"{path}: its sync points do not fit together: {_REMEDY}")
    return Saved(names, partials, tables, digests)


def _tables(found: dict[str, Tensor], place: int) -> Tables:
    fields: dict[str, Any] = {field: found[f"{place}.{field}"] for field in _TABLES}
    return Tables(codec=CODEC, hidden=found[f"{place}.partials"].shape[2], **fields)
