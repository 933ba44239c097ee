"""What codecs know of a sync point before they see a token: calibrated statistics, and tables."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_lowbit.errors import LowbitError


@dataclass(frozen=True)
class Statistics:
    """What calibration knows of the partials of one sync point, or some of it; fp32.

    Attributes:
        ranges: ``[ranks, hidden]``, the paper's R = 2 max(\\|min\\|, \\|max\\|).
        variance: ``[ranks, hidden]``.
        mean: ``[ranks, hidden]``.
        sum_ranges: ``[hidden]``, as `ranges`, of the sum over ranks.
        sum_variance: ``[hidden]``, of the sum over ranks.
    """

    ranges: Tensor | None = None
    variance: Tensor | None = None
    mean: Tensor | None = None
    sum_ranges: Tensor | None = None
    sum_variance: Tensor | None = None

    @classmethod
    def of(cls, partials: Tensor) -> "Statistics":
        """The statistics of ``[ranks, tokens, hidden]``: without Megatron, or to try a codec."""
        partials = partials.float()
        total = partials.sum(dim=0)
        return cls(
            ranges=2 * partials.abs().amax(dim=1),
            variance=partials.var(dim=1, correction=0),
            mean=partials.mean(dim=1),
            sum_ranges=2 * total.abs().amax(dim=0),
            sum_variance=total.var(dim=0, correction=0),
        )


@dataclass(frozen=True)
class Tables:
    """What a codec knows of one sync point before it sees a token.

    Attributes:
        codec: Name of the codec that made them.
        hidden: Features in a token.
        bf16_index: int64 ``[k]``, ascending: the features that travel in BF16.
        body_index: int64 ``[hidden - k]``, ascending: the others (``static-hybrid`` and
            ``scaled-hybrid``).
        scale: fp32 ``[ranks, hidden]``, per rank and feature the value of one quantization step
            (``static-hybrid``) or its size beside other features (``scaled-hybrid``).
        encode_scale: fp32 ``[hidden]``, what a feature is multiplied by before it is rotated, 0
            for the features of the BF16 index (``rotated-hybrid`` and its kin).
        decode_scale: fp32 ``[hidden]``, what it is multiplied by after it is turned back, 0 for the
            features of the BF16 index.
        center: fp32 ``[ranks, hidden]``, what is subtracted from a rank's partial.
        center_sum: fp32 ``[hidden]``, `center` summed in rank order: what is added to the sum.
        of_sum: Tables of the sum over ranks, where they are others than these
            (``static-hybrid`` and ``scaled-hybrid``).
        folded_index: int64 ``[k]``, where a partial has its BF16 features if the weight that made
            it has rotated its body (`codecs.folding`); None for partials as Megatron makes them.
    """

    codec: str
    hidden: int
    bf16_index: Tensor
    # Only codecs that make these four read them: to those they are tensors.
    body_index: Tensor = None  # type: ignore[assignment]
    scale: Tensor = None  # type: ignore[assignment]
    encode_scale: Tensor = None  # type: ignore[assignment]
    decode_scale: Tensor = None  # type: ignore[assignment]
    center: Tensor | None = None
    center_sum: Tensor | None = None
    of_sum: "Tables | None" = None
    folded_index: Tensor | None = None

    @property
    def width(self) -> int:
        """Values of a token's partial: the features, and with a folded weight k more behind."""
        return self.hidden + (0 if self.folded_index is None else self.folded_index.numel())

    def to(self, device: torch.device | str) -> "Tables":
        """The same tables on `device`."""
        kinds = (Tensor, Tables)
        moved: dict[str, Any] = {
            k: v.to(device) if isinstance(v, kinds) else v for k, v in vars(self).items()
        }
        return Tables(**moved)

    def of_ranks(self, start: int, stop: int) -> "Tables":
        """The tables of a group of ranks ``[start, stop)`` of these."""
        return self._by_rank(lambda rows: rows[start:stop])

    def of_nodes(self, nodes: int) -> "Tables":
        """Tables for the sums inside each of `nodes` equal nodes, a row a node.

        A node's sum is at most the sum of its ranks' ranges, so it clips nothing that the ranks
        themselves would not.
        """
        return self._by_rank(lambda rows: rows.unflatten(0, (nodes, -1)).sum(dim=1))

    def _by_rank(self, change: Callable[[Tensor], Tensor]) -> "Tables":
        """With what has a row for each rank changed."""
        changed = self
        if self.scale is not None:
            changed = replace(changed, scale=change(self.scale))
        if self.center is not None:
            center = change(self.center)
            changed = replace(changed, center=center, center_sum=sum_in_rank_order(center))
        return changed


def sum_in_rank_order(values: Tensor) -> Tensor:
    """fp32 sum of ``[ranks, ...]`` over ranks: ((r0 + r1) + r2) + ..., on any device the same."""
    total = values[0].float()
    for value in values[1:]:
        total = total + value.float()
    return total


def check_index(bf16_index: Tensor | None, hidden: int, device: torch.device | str) -> Tensor:
    """Return the BF16 index as ascending int64 on `device`.

    Raises:
        LowbitError: A feature is named twice, or is outside the token.
    """
    if bf16_index is None:
        return torch.empty(0, dtype=torch.int64, device=device)
    index = bf16_index.to(torch.int64).flatten().sort().values
    if index.numel() and (index[0] < 0 or index[-1] >= hidden):
        bad = index[0].item() if index[0] < 0 else index[-1].item()
        raise LowbitError(
            f"BF16 feature {bad} is outside the hidden size {hidden}: give 0 to {hidden - 1}"
        )
    repeated = index[1:][index[1:] == index[:-1]]
    if repeated.numel():
        raise LowbitError(f"BF16 feature {repeated[0].item()} is named twice: give each once")
    return index.to(device)


def check_by_rank(name: str, values: Tensor, hidden: int) -> None:
    """Raise LowbitError unless `values` are ``[ranks, hidden]``; `name` is what they are."""
    if values.ndim != 2 or values.shape[1] != hidden:
        raise LowbitError(
            f"{name} have shape {tuple(values.shape)}, not [ranks, hidden] with hidden {hidden}: "
            "give the statistics of this sync point"
        )


def other_features(bf16_index: Tensor, hidden: int) -> Tensor:
    """The features outside the BF16 index: int64 ``[hidden - k]``, ascending."""
    is_body = torch.ones(hidden, dtype=torch.bool, device=bf16_index.device)
    is_body[bf16_index] = False
    return is_body.nonzero().flatten()


def put_in_place(body: Tensor, kept: Tensor, tables: Tables) -> Tensor:
    """Every feature to its place: fp32 ``[tokens, hidden]`` of the body's and the BF16 index's."""
    place = torch.cat([tables.body_index, tables.bf16_index]).argsort()
    return torch.cat([body, kept], dim=1).index_select(1, place)
