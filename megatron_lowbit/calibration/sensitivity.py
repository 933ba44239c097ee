"""How much divergence each option of a recipe would cost at each sync point.

An error e in the sum of a sync point moves the model's next-token distributions by a KL divergence
of about 1/2 sum_i h_i E[e_i^2] nats a token, where h_i is the second moment of the gradient of the
log-likelihood with respect to feature i of that sum: the diagonal of the Fisher information, which
is the Hessian of the KL divergence at zero error (Amari, Neural Computation 10, 1998). h comes from
a backward pass over tokens that the model itself draws, the errors from really encoding and
decoding the partials of native runs. On SmolLM2-135M at TP 3 the sum over all 60 sync points
foretold 0.0486 nats where 0.0493 were measured, and 0.0229 where 0.0295 were (4,096 tokens).

With error feedback (`codecs.carry`) an error e at one sync point acts on all that is behind it, and
-e on all that is behind the next one, which repairs it. So h_i is then the second moment of the
*difference* of the two gradients, token by token; the last sync point of a chain keeps its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.calibration.plan import SKIP, Option, Options, bits_per_value, candidates
from megatron_lowbit.calibration.recipe import Assignment
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.model import logits as lm
from megatron_lowbit.model.forward import device_of, forward, logits
from megatron_lowbit.model.summing import Point, Summing

_SEED = 1234
# Squared errors scatter far less than squared gradients do: fewer tokens do for them.
_ERROR_SHARE = 4
# Of a sum: the error of an option that misses nearly all of it is not blown up without limit.
_MOST_NOISE = 0.9
Track = Callable[[str, str], Callable]


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
    """
    rank, ranks = dist.get_rank(dp_group), dist.get_world_size(dp_group)
    device, length = device_of(model), sequences.shape[1]
    # By their numbers, which their draws go by: the same for any number of ranks.
    mine = {number: sequences[number] for number in range(rank, len(sequences), ranks)}
    progress = track("sensitivity", "sequence")
    sensitivity = _gradients(model, summing, mine, vocab_size, progress)
    sensitivity = _mean_over(sensitivity.to(device), len(mine) * length, dp_group)
    assignments = candidates(index.hidden)
    few = sequences[: max(1, len(sequences) // _ERROR_SHARE)][rank::ranks]
    progress = track("errors", "sequence")
    costs, noise = _errors(model, summing, index, assignments, few, sensitivity, progress)
    costs = _mean_over(costs.to(device), few.numel(), dp_group)
    noise = _mean_over(noise.to(device), few.numel(), dp_group)
    costs[1] *= _quantized_again(assignments, noise)
    # All ranks go by the first one's figures: plans must be the same to the last bit.
    dist.broadcast(costs, src=0)
    if not costs.isfinite().all():
        number = int((~costs.isfinite()).any(dim=2).any(dim=0).nonzero()[0])
        raise LowbitError(
            f"planning met values that are not finite at {summing.points[number]}: calibrate on "
            "texts that the model can run"
        )
    bits = [bits_per_value(assignment, index.hidden) for assignment in assignments]
    return {
        (point.layer, point.name): [
            Option(*of_one) for of_one in zip(assignments, bits, plain, carried, strict=True)
        ]
        for point, plain, carried in zip(summing.points, *costs.tolist(), strict=True)
    }


def _quantized_again(assignments: list[Assignment], noise: Tensor) -> Tensor:
    """fp64 ``[points, assignments]``: by how much carries make errors larger.

    What a quantization misses is quantized again at the next sync point, and what that misses once
    more: with d the share that is missed, errors settle at d / (1 - d) instead of d. A sync point
    that is skipped misses all, once.
    """
    share = torch.where(noise[1] > 0, noise[0] / noise[1], 0).clamp(0, _MOST_NOISE)
    share[:, assignments.index(SKIP)] = 0
    return 1 / (1 - share)


def _gradients(
    model: nn.Module,
    summing: Summing,
    sequences: dict[int, Tensor],
    vocab_size: int,
    track,
) -> Tensor:
    """fp64 ``[2, points, hidden]``: squared gradients of the log-likelihood, summed over tokens.

    Without feedback, and with it: then an error acts until the next sync point repairs it, and what
    counts is the difference of the gradients behind the two.
    """
    hidden = summing.points[0].hidden
    moments = torch.zeros(2, len(summing.points), hidden, dtype=torch.float64)
    following = following_of(summing.points)
    behind: dict[int, Tensor] = {}  # sync point -> its gradient, until the one before has taken it

    def watch(number: int, partial: Tensor, total: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            own = gradient.double().flatten(0, -2)
            moments[0, number] += own.square().sum(dim=0).cpu()
            behind[number] = own
            if number in following:  # hooks run from the last sync point to the first
                own = own - behind.pop(following[number])
            moments[1, number] += own.square().sum(dim=0).cpu()

        if not total.requires_grad:  # the first one: all that comes after hangs on it
            total.requires_grad_()
        total.register_hook(add)

    with _frozen(model), summing.watching(watch):
        for number in track(list(sequences)):
            generator = torch.Generator().manual_seed(_SEED + number)
            _backward(model, summing, sequences[number], vocab_size, generator)
    return moments


def following_of(points: Sequence[Point]) -> dict[int, int]:
    """Number of a sync point -> of the one that takes its error."""
    last: dict[int, int] = {}  # by chunk
    following = {}
    for number, point in enumerate(points):
        if not point.apart:
            if point.chunk in last:
                following[last[point.chunk]] = number
            last[point.chunk] = number
    return following


def _backward(model, summing: Summing, sequence: Tensor, vocab_size, generator) -> None:
    """Gradients of the log-likelihood of tokens that the model draws, one after each token."""
    group = summing.points[0].group
    with torch.enable_grad():
        out = forward(model, sequence[None])[0].float()
    seen = out.detach()
    entries = dist.get_rank(group) * out.shape[1] + torch.arange(out.shape[1])
    seen = seen.masked_fill(entries.to(out.device) >= vocab_size, torch.finfo(out.dtype).min)
    # The largest of logits with Gumbel noise is a draw from their softmax.
    everywhere = out.shape[1] * dist.get_world_size(group)
    uniform = torch.rand(len(out), everywhere, generator=generator).clamp_min_(1e-20)
    noise = -(-uniform.log()).log()[:, entries]
    drawn = lm.top1(seen + noise.to(out.device), group=group)
    out.backward(lm.log_likelihood_gradient(seen, drawn, group=group))


def _errors(
    model: nn.Module,
    summing: Summing,
    index: CalibrationIndex,
    assignments: list[Assignment],
    sequences: Tensor,
    sensitivity: Tensor,
    track,
) -> tuple[Tensor, Tensor]:
    """Predicted divergence, by both sensitivities, and squares, of the errors and of the sums.

    Both fp64 ``[2, points, assignments]``, summed over tokens.
    """
    costs = torch.zeros(2, len(summing.points), len(assignments), dtype=torch.float64)
    noise = torch.zeros_like(costs)
    tables = [[index.tables_at(p, a, summing.ranks) for p in summing.points] for a in assignments]
    by_assignment = [
        summing.reducers([assignment.make()] * len(of_points), of_points, "one-shot")
        for assignment, of_points in zip(assignments, tables, strict=True)
    ]

    def watch(number: int, partial: Tensor, total: Tensor) -> None:
        exact = summing.exact(summing.points[number], partial)
        weights = sensitivity[:, number].to(exact.device)
        noise[1, number] += exact.double().square().sum().item()
        for column, reducers in enumerate(by_assignment):
            if assignments[column] == SKIP:  # the calibrated mean is the sum
                mean = tables[column][number].center_sum
                error = -exact if mean is None else mean - exact
            else:  # reducers may sum in place
                error = reducers[number](partial.clone(), False).float() - exact
            squares = error.flatten(0, -2).double().square().sum(dim=0)
            costs[:, number, column] += 0.5 * (weights @ squares).cpu()
            noise[0, number, column] += squares.sum().item()

    with summing.watching(watch):
        for number in track(range(len(sequences))):
            logits(model, sequences[number][None])
    return costs, noise


def _mean_over(total: Tensor, tokens: int, dp_group: dist.ProcessGroup | None) -> Tensor:
    """The mean over all data-parallel ranks' tokens of what each has summed."""
    summed = torch.cat([total.flatten(), total.new_tensor([tokens])])
    dist.all_reduce(summed, group=dp_group)
    return (summed[:-1] / summed[-1]).view(total.shape)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient: only what goes through the sums is kept for the backward."""
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
