"""Chains checked by numbers: what a layer adds to the residual stream must be what it sums.

`chains` tells by structure which sync points carry errors. While a model is calibrated, one
sequence shows whether that is so: the output of each layer less its input must be its sync points'
sums, their biases and what routed experts add, but for rounding, and the next layer must get that
output. The result stands in the calibration index, and a model is held against it when it is
loaded: `agree`.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from megatron_lowbit.comm.agreement import gather_values
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.sums.sync_points import SyncPoint, moe_layers, transformer_layers
from megatron_lowbit.model.forward import logits
from megatron_lowbit.model.summing import Summing

# What reasons found by numbers begin with: no structure of a model shows them when it is loaded.
_BY_NUMBERS = "by numbers, "
CHANGED = _BY_NUMBERS + "its layer adds something else to the stream than its sums"
MOVED = _BY_NUMBERS + "the stream changes between layers"


def check_chain(model: nn.Module | Iterable[nn.Module], summing: Summing, tokens: Tensor) -> dict:
    """Why each sync point is outside the chain, by structure and by numbers; call on every rank.

    Args:
        model: Natively summing.
        summing: Its sync points, all `SyncPoint`.
        tokens: int64 ``[n]``, one sequence.

    Returns:
        Name of each sync point -> the reason, empty for one that carries: as the manifest has it.
    """
    points: Sequence[SyncPoint] = summing.points  # type: ignore[assignment]
    mixtures = {number: module for number, _, module in moe_layers(model)}
    layers = transformer_layers(model)
    watches = [_Layer(layers[n], n, points, mixtures.get(n)) for n in sorted(layers)]
    by_number = {watch.number: watch for watch in watches}
    with summing.watching(lambda n, _, total: by_number[points[n].layer].add(points[n], total)):
        try:
            logits(model, tokens[None])
        finally:
            for watch in watches:
                watch.close()
    moved = any(not a.goes_to(b) for a, b in zip(watches, watches[1:], strict=False))
    moved |= _moves_between(summing.stages.gather((watches[0].given, watches[-1].left)))
    found = {number: CHANGED for number, watch in by_number.items() if watch.differs}
    chain = {str(point): point.apart or found.get(point.layer, "") for point in points}
    # With sequence parallelism each rank sees its own tokens, in a pipeline its own layers.
    of_ranks = gather_values((chain, moved))
    otherwise = MOVED if any(moves for _, moves in of_ranks) else ""
    names = dict.fromkeys(name for reasons, _ in of_ranks for name in reasons)
    return {n: next((c[n] for c, _ in of_ranks if c.get(n)), otherwise) for n in names}


def _moves_between(ends: list[tuple[str, str]]) -> bool:
    """Whether a pipeline stage got anything else than the one before left.

    Args:
        ends: For each stage, digests of what its first layer was given and its last one left.
    """
    return any(left not in (given, "") for (_, left), (given, _) in pairwise(ends))


class _Layer:
    """What goes into a layer and comes out of it in one pass, against what it sums.

    Attributes:
        number: Megatron's.
        differs: Whether the layer added anything else.
    """

    def __init__(
        self,
        layer: nn.Module,
        number: int,
        points: Sequence[SyncPoint],
        mixture: nn.Module | None,
    ):
        self.number, self.differs = number, False
        self._given = self._left = torch.empty(0)
        self._parts: list[Tensor] = []
        # What a mixture's shared expert sums is in the mixture's output.
        inside = set() if mixture is None else set(mixture.modules())
        here = [point for point in points if point.layer == number]
        self._counted = {point.module for point in here} - inside
        self._is_outside = all(point.apart for point in here)  # what it adds may be anything
        self._hooks = [
            layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            layer.register_forward_hook(self._leave),
        ]
        if mixture is not None:
            self._hooks.append(mixture.register_forward_hook(self._mixed))

    def add(self, point: SyncPoint, total: Tensor) -> None:
        """A sync point's sum, and the bias that the layer adds to it."""
        if point.module not in self._counted:
            return
        bias = getattr(point.module, "bias", None)
        self._parts.append(total.clone())  # Megatron adds in place
        if bias is not None and bias.numel():
            self._parts.append(bias.expand_as(total))

    @property
    def given(self) -> str:
        """Digest of what went into it."""
        return _digest(self._given)

    @property
    def left(self) -> str:
        """Digest of what came out of it; empty where that is not all numbers."""
        return "" if self._left.isnan().any() else _digest(self._left)

    def goes_to(self, following: "_Layer") -> bool:
        """Whether the next layer got what this one left."""
        return torch.equal(self._left, following._given) or bool(self._left.isnan().any())

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, layer: nn.Module, inputs: tuple, named: dict) -> None:
        given = named["hidden_states"] if "hidden_states" in named else inputs[0]
        self._given = given.detach().clone()
        self._parts.clear()

    def _mixed(self, mixture: nn.Module, inputs: tuple, output: tuple) -> None:
        out, bias = output
        self._parts += [part.detach().clone() for part in (out, bias) if part is not None]

    def _leave(self, layer: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        left = output if isinstance(output, Tensor) else output[0]
        self._left = left.detach().clone()
        if not self._is_outside:
            self.differs = left.shape != self._given.shape or self._adds_more(left)
        self._parts.clear()

    def _adds_more(self, left: Tensor) -> bool:
        expected, coarsest = self._given.float(), torch.finfo(left.dtype).eps
        size = expected.abs()
        for part in self._parts:
            mine = _like(part, left)
            expected, size = expected + mine, size + mine.abs()
            coarsest = max(coarsest, torch.finfo(part.dtype).eps)
        # Each addition rounds by half an eps of what it gives, at most.
        most = (len(self._parts) + 1) * coarsest / 2 * size
        return bool(((left.float() - expected).abs() > most).any())


def _digest(values: Tensor) -> str:
    raw = values.contiguous().cpu().view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def _like(part: Tensor, stream: Tensor) -> Tensor:
    """fp32 `part` as `stream` has it: this rank's tokens with sequence parallelism."""
    part = part.float()
    if part.numel() == stream.numel():
        return part.reshape(stream.shape)
    from megatron.core import parallel_state

    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return part.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()].reshape(stream.shape)


def agree(points: list[SyncPoint], manifest: dict, origin: str) -> list[SyncPoint]:
    """`points` with what calibration found by numbers.

    Args:
        points: As structure tells, of this rank.
        manifest: Of a calibration index; one of before has no ``chain``, and is taken.
        origin: Where the index is from, for messages.

    Raises:
        LowbitError: Model and index disagree; the message names the first such sync point.
    """
    chain, agreed = manifest.get("chain"), []
    if chain is None:
        return points
    for point in points:
        found = chain.get(str(point), point.apart)
        if found.startswith(_BY_NUMBERS) and not point.apart:
            point = replace(point, apart=found)
        if bool(found) != bool(point.apart):
            here = f"outside the chain here ({point.apart})" if point.apart else "in the chain here"
            there = f"outside of it ({found})" if found else "in it"
            raise LowbitError(
                f"{point} is {here}, and {there} in {origin}: error feedback needs the model that "
                "was calibrated; calibrate this one with python -m megatron_lowbit calibrate, or "
                "do without (--lowbit-no-feedback; no NAME@feedback in an evaluation)"
            )
        agreed.append(point)
    return agreed
