"""The options of every sync point and what they cost, for `calibration.plan`.

By gradients (`gradients`), or, where a backward pass cannot be, by running the model
(`forward_only`).
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lowbit import cli
from megatron_lowbit.calibration.costs.forward_only import FEW_TOKENS, by_divergence
from megatron_lowbit.calibration.costs.gradients import (
    Track,
    by_gradients,
    why_no_gradients,
    with_direction,
)
from megatron_lowbit.calibration.costs.option_errors import PARTIALS, SUMS, Costs, OptionErrors
from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.calibration.plan import Cost, Option, Options, bits_per_value, candidates
from megatron_lowbit.calibration.recipe import Assignment
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.model.forward import device_of
from megatron_lowbit.model.summing import Summing


def measure_options(
    model: nn.Module,
    summing: Summing,
    index: CalibrationIndex,
    sequences: Tensor,
    *,
    vocab_size: int,
    dp_group: dist.ProcessGroup | None,
    track: Track,
) -> Options:
    """The options of every sync point; call it on every rank.

    Args:
        model: Its weights loaded.
        summing: How it sums.
        index: Calibrated statistics.
        sequences: int64 ``[n, seq_length]``, the same on every rank.
        vocab_size: Without padding.
        dp_group: The ranks that share the sequences.
        track: (what, unit) -> wraps a loop, for a progress bar.

    Returns:
        Key of a sync point -> its options, the same on every rank.

    Raises:
        LowbitError: What was measured is not finite.
    """
    assignments = candidates(index.hidden)
    errors = OptionErrors(summing, index, assignments)
    reason = why_no_gradients(model, summing, sequences[0])
    rank, ranks = dist.get_rank(dp_group), dist.get_world_size(dp_group)
    if reason:
        cli.say(
            f"planning without gradients ({reason}): each sync point's options are run through the "
            "whole model, which is slower"
        )
        few = sequences[: max(1, FEW_TOKENS // sequences.shape[1]), :FEW_TOKENS]
        costs = by_divergence(
            *(model, summing, index, errors, assignments, few[rank::ranks]),
            vocab_size=vocab_size,
            dp_group=dp_group,
            track=track,
        )
    else:
        # By their numbers, which their draws go by: the same for any number of ranks.
        mine = {number: sequences[number] for number in range(rank, len(sequences), ranks)}
        costs = by_gradients(
            *(model, summing, errors, len(assignments), mine), vocab_size=vocab_size, track=track
        )
        tokens = len(mine) * sequences.shape[1]
        costs = _mean_over(costs, tokens, device_of(model), dp_group).over(summing.stages)
        costs = with_direction(costs)
    return _options(costs, assignments, summing, index.hidden, device_of(model))


def _mean_over(
    costs: Costs, tokens: int, device: torch.device, dp_group: dist.ProcessGroup | None
) -> Costs:
    """The mean over all data-parallel ranks' tokens of what each has summed over its own."""
    total = torch.cat([costs.nats.flatten(), costs.missed.flatten(), torch.tensor([float(tokens)])])
    total = total.to(device)
    dist.all_reduce(total, group=dp_group)
    nats, missed = (total[:-1] / total[-1]).cpu().split([costs.nats.numel(), costs.missed.numel()])
    return Costs(nats.view(costs.nats.shape), missed.view(costs.missed.shape))


def _options(
    costs: Costs,
    assignments: list[Assignment],
    summing: Summing,
    hidden: int,
    device: torch.device,
) -> Options:
    # All ranks go by the first one's figures: plans must be the same to the last bit.
    for values in (costs.nats, costs.missed):
        agreed = values.to(device)
        dist.broadcast(agreed, src=0)
        values.copy_(agreed)
    finite = costs.nats.isfinite().all(dim=-1).flatten(0, 1).all(dim=0)
    if not finite.all():
        point = summing.everywhere[int((~finite).nonzero()[0])]
        raise LowbitError(
            f"planning met values that are not finite at {point}: calibrate on texts that the "
            "model can run"
        )
    bits = [bits_per_value(assignment, hidden) for assignment in assignments]
    options: Options = {}
    for number, point in enumerate(summing.everywhere):
        partials, sums = (costs.nats[kind, :, number].T.tolist() for kind in (PARTIALS, SUMS))
        missed = costs.missed[PARTIALS, number].clamp(0, 1).tolist()
        options[point.layer, point.name] = [
            Option(assignment, b, Cost(*of_partials), share, Cost(*of_sum))
            for assignment, b, of_partials, share, of_sum in zip(
                assignments, bits, partials, missed, sums, strict=True
            )
        ]
    return options
