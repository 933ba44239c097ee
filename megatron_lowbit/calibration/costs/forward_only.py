"""What options cost where no gradients can be had: the model is run with each sync point's errors.

For FP8 and quantized weights, and modules that do not differentiate. One sync point at a time is
quantized and all others send BF16: with error feedback the next one then takes the error back, as
the real reducers do it. What is measured is the KL divergence from native communication.

Each run takes a forward pass, so few of them are made: 1 bit first, more bits only where so many
nats are lost that the loss is no longer proportional to the squared error, and for each sync point
the most bits that there are. Their divergence is left out of the others': any change, however
small, makes a BF16 model round otherwise, which costs SmolLM2-135M 0.001 to 0.002 nats. Options
that are not run cost in proportion to the share of a token's energy that they miss, which one
native run measures for all.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lowbit.calibration.costs.gradients import Track
from megatron_lowbit.calibration.costs.neighbours import following_of
from megatron_lowbit.calibration.costs.option_errors import (
    CARRIED,
    HANDED_ON,
    PARTIALS,
    PLAIN,
    SUMS,
    Costs,
    OptionErrors,
    shares,
    sum_of,
)
from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.calibration.plan import SKIP
from megatron_lowbit.calibration.recipe import Assignment
from megatron_lowbit.model import logits as lm
from megatron_lowbit.model.forward import device_of, logits
from megatron_lowbit.model.summing import Summing

FEW_TOKENS = 256
_PROPORTIONAL = 0.03  # nats: up to here a loss grows with the squared error
# Of the typical sync point: what is lost in the noise of so few tokens still costs something.
_LEAST = 0.05


def by_divergence(
    model: nn.Module,
    summing: Summing,
    index: CalibrationIndex,
    errors: OptionErrors,
    assignments: list[Assignment],
    sequences: Tensor,
    *,
    vocab_size: int,
    dp_group: dist.ProcessGroup | None,
    track: Track,
) -> Costs:
    """What options cost a token, the same on every rank; call it on every rank.

    Args:
        model: Its weights loaded.
        summing: How it sums.
        index: Calibrated statistics.
        errors: Of the options.
        assignments: The options.
        sequences: int64 ``[n, seq_length]``, this rank's share.
        vocab_size: Without padding.
        dp_group: The ranks that share the sequences.
        track: Wraps a loop, for a progress bar.
    """
    runs = _Runs(model, summing, index, sequences, vocab_size, dp_group)
    shares_of = _missed(model, summing, errors, len(assignments), sequences)
    missed, passed = (runs.mean(values) for values in shares_of)
    # Those without BF16 features, fewest bits first: they are run.
    ladder = sorted(
        (n for n, a in enumerate(assignments) if a.bf16_features == 0 and a != SKIP),
        key=lambda n: assignments[n].make().bits,
    )
    rates = torch.zeros(2, *missed.shape[1:], dtype=torch.float64)
    for number in track("divergence", "sync point")(list(range(len(summing.everywhere)))):
        here = _Ladder(number, ladder, [assignments[n] for n in ladder], missed[PARTIALS, number])
        floor = runs.divergence(number, here.steps[-1], feedback=True)
        for kind, feedback in ((PLAIN, False), (CARRIED, True)):
            rates[kind, number] = runs.rates(here, floor=floor, feedback=feedback)
    return _costs(summing, _raised(rates), missed, passed, ladder[0])


def _raised(rates: Tensor) -> Tensor:
    """`rates` with none far below the typical one."""
    for kind in (PLAIN, CARRIED):
        positive = rates[kind][rates[kind] > 0]
        typical = positive.median().item() if len(positive) else 0.0
        rates[kind].clamp_(min=_LEAST * typical)
    return rates


def _costs(summing: Summing, rates: Tensor, missed: Tensor, passed: Tensor, coarsest: int) -> Costs:
    """What options cost, from nats for each share of the energy that is missed.

    Args:
        summing: How the model sums.
        rates: fp64 ``[2, points, options]``, `PLAIN` and `CARRIED`.
        missed: fp64 ``[2, points, options]``, of partials and of sums.
        passed: Likewise, as a share of the next sync point's energy.
        coarsest: The option whose rate the next sync point has for what it takes.
    """
    costs = Costs(torch.zeros(2, 3, *missed.shape[1:], dtype=torch.float64), missed)
    for what in (PARTIALS, SUMS):
        costs.nats[what, :HANDED_ON] = rates * missed[what]
        for number, after in following_of(summing.everywhere).items():
            handed_on = rates[CARRIED, after, coarsest] * passed[what, number]
            costs.nats[what, HANDED_ON, number] = handed_on
    return costs


@dataclass(frozen=True)
class _Ladder:
    """The options of one sync point that may be run.

    Attributes:
        number: Of the sync point.
        columns: Numbers of the options, fewest bits first.
        steps: The options.
        missed: fp64 ``[options]``, the share that each option of the sync point misses.
    """

    number: int
    columns: list[int]
    steps: list[Assignment]
    missed: Tensor


class _Runs:
    """Runs of the model with one sync point quantized, against native ones."""

    def __init__(self, model, summing: Summing, index, sequences: Tensor, vocab_size, dp_group):
        self._model, self._summing, self._index = model, summing, index
        self._sequences, self._vocab_size, self._dp_group = sequences, vocab_size, dp_group
        self._group = summing.points[0].group
        self._native = [self._log_probs(sequence) for sequence in sequences]
        exact = Assignment("bf16", 16)
        self._exact = [
            (exact.make(), index.tables_at(p, exact, summing.ranks)) for p in summing.points
        ]

    def rates(self, ladder: _Ladder, *, floor: float, feedback: bool) -> Tensor:
        """fp64 ``[options]``: nats for each share of the energy that is missed at one sync point.

        Args:
            ladder: What to run there.
            floor: Nats of its last step, which are left out of those of the others.
            feedback: Whether the next sync point takes the error.
        """
        missed = ladder.missed
        rates, done = torch.zeros_like(missed), missed.new_full((), torch.inf)
        for step, column in list(zip(ladder.steps, ladder.columns, strict=True))[:-1]:
            excess = self.divergence(ladder.number, step, feedback=feedback) - floor
            share = (missed[column] - missed[ladder.columns[-1]]).clamp_min(1e-12)
            rates = torch.where(missed < done, excess / share, rates)
            done = missed[column] * 0.75  # finer options go by the next run, if there is one
            if excess <= _PROPORTIONAL:
                break
        return rates

    def divergence(self, number: int, assignment: Assignment, *, feedback: bool) -> float:
        """Nats a token if one sync point has an assignment and all others send BF16."""
        chosen, at = list(self._exact), number - self._summing.first
        if 0 <= at < len(chosen):  # on this stage
            tables = self._index.tables_at(
                self._summing.points[at], assignment, self._summing.ranks
            )
            chosen[at] = assignment.make(), tables
        codecs, of_points = zip(*chosen, strict=True)
        reducers = self._summing.reducers(codecs, of_points, "one-shot", feedback=feedback)
        nats = torch.zeros((), dtype=torch.float64)
        with self._summing.using(reducers):
            for sequence, native in zip(self._sequences, self._native, strict=True):
                low = self._log_probs(sequence)
                nats += lm.kl_divergence(native, low, group=self._group).double().sum().cpu()
        return self.mean(nats).item()

    def mean(self, total: Tensor) -> Tensor:
        """The mean over all ranks' tokens, the same on every rank to the last bit."""
        tokens = total.new_tensor([self._sequences.numel()])
        summed = torch.cat([total.flatten(), tokens]).to(device_of(self._model))
        dist.all_reduce(summed, group=self._dp_group)
        dist.broadcast(summed, src=0)
        return (summed[:-1] / summed[-1]).cpu().view(total.shape)

    def _log_probs(self, sequence: Tensor) -> Tensor:
        out = logits(self._model, sequence[None])[0]
        return lm.log_softmax(out, vocab_size=self._vocab_size, group=self._group)


def _missed(
    model: nn.Module, summing: Summing, errors: OptionErrors, options: int, sequences: Tensor
) -> tuple[Tensor, Tensor]:
    """Shares of a token's energy that options miss, here and of the next sync point's.

    Both fp64 ``[2, points, options]``, of partials and of sums, of all stages, summed over tokens.
    """
    shares_of, stages = _Shares(summing, errors, options), summing.stages
    for sequence in sequences:
        for turn in range(stages.count):  # each needs what the stage before has left
            is_mine = turn == stages.number
            with summing.watching(shares_of.watch) if is_mine else nullcontext():
                logits(model, sequence[None])
            shares_of.left = stages.shared(shares_of.left, source=turn)
    here, there = zip(*stages.gather((shares_of.here, shares_of.there)), strict=True)
    return sum_of(here), sum_of(there)


class _Shares:
    """What options miss at the sync points of this stage, numbered over all.

    Attributes:
        here: fp64 ``[2, points, options]``, shares of a token's energy.
        there: Likewise, of the next sync point's energy.
        left: Sync point -> what it missed of each token, until the next one is reached.
    """

    def __init__(self, summing: Summing, errors: OptionErrors, options: int):
        self._errors, self._first = errors, summing.first
        following = following_of(summing.everywhere)
        self._before = {after: number for number, after in following.items()}
        self.here = torch.zeros(2, len(summing.everywhere), options, dtype=torch.float64)
        self.there = torch.zeros_like(self.here)
        self.left: dict[int, list[tuple[int, int, Tensor]]] = {}

    def watch(self, at: int, partial: Tensor, total: Tensor) -> None:
        number = self._first + at
        self.left[number], energy = [], None
        for column, *both in self._errors.at(at, partial):
            for kind, error in zip((PARTIALS, SUMS), both, strict=True):
                squares = error.square().sum(dim=1)
                energy = squares if energy is None else energy
                self.here[kind, number, column] += shares(squares, energy)
                self.left[number].append((kind, column, squares.cpu()))
        assert energy is not None, "there are options"
        before = self._before.get(number, -1)
        for kind, column, squares in self.left.pop(before, []):
            self.there[kind, before, column] += shares(squares.to(energy.device), energy)
