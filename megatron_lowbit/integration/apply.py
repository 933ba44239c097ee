"""Switch a model's sync points to the low-bit path, and back.

    handle = megatron_lowbit.apply(model, "CKPT/lowbit")
    print(handle)            # one line: how many sync points, which codec, what stays native
    handle.status()          # each sync point, with its codec and traffic
    handle.stats()           # calls, bytes, time and choices, as JSON can hold them
    handle.remove()          # Megatron's own reduction again

Call it after the checkpoint is loaded and before the first forward pass: the index is checked
against the model's weights. The model's parameters, buffers and state_dict are not touched.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.comm.agreement import (
    gather_values,
    on_every_rank,
    require_equal,
    require_some,
)
from megatron_lowbit.comm.call_check import CHECK_SWITCH, is_checking
from megatron_lowbit.comm.policy.making import make_policy
from megatron_lowbit.comm.policy.policy import DEFAULT_MODE, Policy, Settings
from megatron_lowbit.comm.policy.runs import LARGEST
from megatron_lowbit.comm.policy.timings import BF16_BYTES
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.assignment import AssignedPoints, assign
from megatron_lowbit.integration.handle import Extras, Handle
from megatron_lowbit.integration.sums.cuda_graphs import check_cuda_graphs
from megatron_lowbit.integration.sums.experts import find_expert_sums
from megatron_lowbit.integration.sums.folded_weights import Folding, check_foldable
from megatron_lowbit.integration.sums.gathers import find_gathers
from megatron_lowbit.integration.sums.routes import may_scatter
from megatron_lowbit.integration.sums.sync_points import (
    SyncPoint,
    modules_of,
    sync_points_here,
    transformer_layers,
    why_none,
)
from megatron_lowbit.kernels.select import rotation_on
from megatron_lowbit.kernels.switches import ROTATION_SWITCH, rotation


def apply(
    model: nn.Module | Iterable[nn.Module],
    index_dir: str | Path | CalibrationIndex,
    *,
    codec: str | None = None,
    bits: int | tuple[int, int] | None = None,
    collective: str | Settings = DEFAULT_MODE,
    all_gather_bits: int | None = None,
    experts_bits: int | None = None,
    recipe: str | Path | None = None,
    fold: bool = False,
    feedback: bool | None = None,
) -> Handle:
    """Switch the sync points of a Megatron-core model to low-bit payloads; call it on every rank.

    Args:
        model: A GPTModel or HybridModel of the local or Transformer Engine's spec with its weights
            loaded, wrapped or not: all of it, or this rank's pipeline stage, or the list of its
            chunks where stages interleave; without CUDA graphs so far.
        index_dir: The calibration index of this model (`python -m megatron_lowbit calibrate`
            writes it), or one already read.
        codec: A codec's name, for all sync points; by the index's recipe, or with its own codec,
            if left out.
        bits: Bits of a body value, or a pair: of partials, and of sums, for all sync points; by
            the index's recipe, or its own, if left out, or the codec's default for another codec.
        collective: A mode of `comm.policy.policy.MODES`, or `Settings` with a tuning file or nodes.
        all_gather_bits: With sequence parallelism: bits of a value in the all-gather before
            each column-parallel linear; native BF16 if left out.
        experts_bits: Bits of a value in the token dispatchers' sums of routed experts' outputs;
            native if left out.
        recipe: A recipe file (`calibration.recipe`) whose rules come on top of the above.
        fold: Fold the rotations into the weights (`integration.sums.folded_weights`): cheaper to
            encode, a little more error; for one-shot and two-shot. Errors are then not carried.
        feedback: Carry what a sync point could not send to the next one (`comm.feedback`). If left
            out, every codec of ours does but the paper's `static-hybrid`.

    Returns:
        A handle with `status()`, `stats()` and `remove()`.

    Raises:
        LowbitError: On every rank: no or a damaged index, an index for
            another model, hidden size, layer count, or (where the codec's tables depend on it) TP
            degree; a bad recipe; an unknown codec or collective; a tuning file for another machine;
            a sync point that cannot be reached; CUDA graphs that are captured already, or settings
            of theirs that our work cannot be captured with; an unknown MEGATRON_LOWBIT_ROTATION;
            ranks that disagree.
    """
    settings = on_every_rank(
        lambda: collective if isinstance(collective, Settings) else Settings(collective)
    )
    model = model if isinstance(model, nn.Module) else list(model)
    points, native = on_every_rank(lambda: sync_points_here(model))
    require_some(points, why_none(model, native))
    _require_same_points(model, points)
    on_every_rank(lambda: check_cuda_graphs(model, gathers=all_gather_bits is not None))
    rules = Path(recipe) if recipe is not None else None
    if fold and feedback:
        raise LowbitError("a folded weight's error is rotated: it cannot be carried on")
    feedback = False if fold else feedback
    wishes: dict[str, Any] = {"codec": codec, "bits": bits, "rules": rules, "feedback": feedback}
    assigned = on_every_rank(lambda: assign(model, points, index_dir, **wishes))
    require_some(assigned.points, f"{recipe} leaves no sync point in low bits")
    gatherers = on_every_rank(lambda: find_gathers(model, all_gather_bits))
    require_some(
        gatherers or all_gather_bits is None,
        "--lowbit-all-gather has nothing to gather: it is for models with --sequence-parallel "
        "and the local spec",
    )
    experts = on_every_rank(lambda: find_expert_sums(model, experts_bits))
    require_some(
        experts or experts_bits is None,
        "--lowbit-experts has nothing to sum: it is for MoE models whose experts' outputs are "
        "summed over ranks (--moe-token-dispatcher-type allgather, or expert tensor parallelism)",
    )
    on_every_rank(lambda: _check_fold(model, assigned, settings) if fold else None)
    on_every_rank(rotation)  # a bad value is said before ranks wait for each other
    on_every_rank(is_checking)
    # Tensor-parallel groups agree each for itself; where one cannot, all ranks say so.
    wanted = (all_gather_bits, experts_bits, fold)
    policy = on_every_rank(lambda: _agreed_policy(model, points, assigned, settings, wanted))
    folding = Folding(assigned.points, assigned.tables) if fold else None
    extras = Extras(gatherers, experts, folding)
    return Handle(model, assigned, policy, native | assigned.native, extras, _stage_of(model))


def _require_same_points(model: nn.Module | Iterable[nn.Module], points: list[SyncPoint]) -> None:
    """Raise on every rank if ranks with the same layers have found other sync points in them.

    One that has none would not take part in what the others of its group agree on.
    """
    found = gather_values((sorted(transformer_layers(model)), [str(point) for point in points]))
    for rank, (layers, names) in enumerate(found):
        other = next(other for other, (same, _) in enumerate(found) if same == layers)
        if names != found[other][1]:
            raise LowbitError(
                f"ranks differ in the sync points that could use low bits: rank {other} has "
                f"{len(found[other][1])}, rank {rank} has {len(names)} of the same layers"
            )


def _agreed_policy(
    model: nn.Module | Iterable[nn.Module],
    points: list[SyncPoint],
    assigned: AssignedPoints,
    settings: Settings,
    wanted: tuple,
) -> Policy | None:
    """One policy for all of a stage's sync points; None if none is in low bits."""
    if not points:
        return None
    group, weight = points[0].group, points[0].module.weight
    codecs = sorted({repr(codec) for codec in assigned.codecs})
    feedback = "errors carried" if assigned.has_feedback else "errors not carried"
    agreed = (codecs, feedback, wanted, str(weight.dtype), assigned.digest())
    require_equal("codec, feedback, dtype or calibration index", agreed, group=group)
    require_equal(ROTATION_SWITCH, rotation_on(weight.device), group=group)
    require_equal(CHECK_SWITCH, is_checking(), group=group)
    if not assigned.points:
        return None
    _check_groups(points)
    return make_policy(
        settings,
        group=group,
        device=weight.device,
        kinds=assigned.kinds(),
        dtype=weight.dtype,
        scatters=may_scatter(point.module for point in points),
        largest=_longest_message(model, assigned.tables[0].hidden),
    )


def _check_groups(points: list[SyncPoint]) -> None:
    """Raise unless all sum over the same ranks: one policy, timed on them, is for all."""
    ranks = dist.get_process_group_ranks(points[0].group)
    for point in points:
        mine = dist.get_process_group_ranks(point.group)
        if mine != ranks:
            raise LowbitError(
                f"{point} sums over ranks {mine}, and {points[0]} over {ranks}: all sync points "
                "of a stage must sum over the same group"
            )


def _longest_message(model: nn.Module | Iterable[nn.Module], hidden: int) -> int:
    """Bytes in BF16 of the longest sequence that the model is for; `LARGEST` if it does not say."""
    lengths = (getattr(module, "max_sequence_length", None) for _, module in modules_of(model))
    tokens = next((length for length in lengths if isinstance(length, int)), None)
    return LARGEST if tokens is None else tokens * hidden * BF16_BYTES


def _stage_of(model: nn.Module | Iterable[nn.Module]) -> tuple[tuple[int, ...], str]:
    """The numbers of this rank's layers, and how to say which, behind what is counted.

    No words if no rank has other layers. Call it on every rank.
    """
    layers = tuple(sorted(transformer_layers(model)))
    if all(other == layers for other in gather_values(layers)):
        return layers, ""
    return layers, f" of layers {', '.join(map(str, layers))}" if layers else " of this stage"


def _check_fold(model, assigned: AssignedPoints, settings: Settings) -> None:
    if settings.mode not in ("one-shot", "two-shot"):
        raise LowbitError(
            f"--lowbit-fold cannot work with --lowbit-collective {settings.mode}, which may send "
            "what is not rotated: choose one-shot or two-shot"
        )
    if assigned.points and dist.get_world_size(assigned.points[0].group) == 1:
        raise LowbitError("--lowbit-fold with one rank: nothing is encoded, leave it out")
    for codec, tables in zip(assigned.codecs, assigned.tables, strict=True):
        if tables.encode_scale is None:
            raise LowbitError(
                f"--lowbit-fold: {codec.name} has no rotation to fold, use shaped-hybrid or "
                "rotated-hybrid"
            )
    check_foldable([module for _, module in modules_of(model)], assigned.points)
