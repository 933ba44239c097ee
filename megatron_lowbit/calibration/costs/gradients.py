"""How much divergence each option of a recipe would cost at each sync point, by gradients.

An error e in the sum of a sync point moves the model's next-token distributions by a KL divergence
of about 1/2 E[(e . g)^2] nats a token, where g is the gradient of the log-likelihood with respect
to that sum: the Fisher information, which is the Hessian of the KL divergence at zero error (Amari,
Neural Computation 10, 1998). g comes from a backward pass over tokens that the model itself draws,
e from really encoding and decoding the partials of the same tokens.

Products are taken token by token. To multiply the mean squares of e and g, feature by feature, is
cheaper and was wrong by a factor of 0.01 to 4: the few tokens with massive activations have large
errors and small gradients (SmolLM2-135M: MLPs of layers 3, 12, 29 and 30), and an error of 1 or 2
bits has the direction of what is sent (attention of layers 1 to 4). Of what is sent, x, a codebook
misses a share m: that part of the error is -m x, and the rest is noise, whose features have nothing
to do with each other. So E[(e . g)^2] is taken as (1 - m) sum_i E[e_i^2 g_i^2] + m^2 E[(x . g)^2],
which scatters far less over texts than E[(e . g)^2] itself and is the same on average.

With error feedback (`codecs.carry`) an error e at one sync point acts on all that is behind it, and
-e on all that is behind the next one, which repairs it. So g is then the *difference* of the two
gradients; the last sync point of a chain keeps its own. What the next one takes it quantizes with
its own partial, and misses a share of it: as noise all over its features, so that costs
1/2 E[|e|^2 |g'|^2] / hidden times that share, g' being the next one's g.

The sum that two-shot quantizes again has a carry of its own, and so the same sensitivity.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
)
from megatron_lowbit.comm.agreement import gather_values
from megatron_lowbit.model import logits as lm
from megatron_lowbit.model.forward import by_stage, forward
from megatron_lowbit.model.summing import Summing

_SEED = 1234
_WORDS = ("derivative", "differentiable", "does not require grad", "not implemented for")
Track = Callable[[str, str], Callable]


def by_gradients(
    model: nn.Module,
    summing: Summing,
    errors: OptionErrors,
    options: int,
    sequences: dict[int, Tensor],
    *,
    vocab_size: int,
    track: Track,
) -> Costs:
    """What options cost here, over all tokens of `sequences`.

    Of all ranks' and all stages' sums take `with_direction`.

    Args:
        model: Its weights loaded.
        summing: How it sums.
        errors: Of the options.
        options: How many there are.
        sequences: By number, which its draws go by.
        vocab_size: Without padding.
        track: Wraps a loop, for a progress bar.
    """
    costs = Costs.zeros(len(summing.everywhere), options)
    with _frozen(model):
        for number in track("sensitivity", "sequence")(list(sequences)):
            generator = torch.Generator().manual_seed(_SEED + number)
            meter = _Meter(summing, errors, costs)
            with summing.watching(meter.watch):
                _backward(model, summing, sequences[number], vocab_size, generator)
            meter.finish()
    return costs


class _Meter:
    """Adds one sequence's products of errors and gradients to `costs`, in its backward pass.

    Sync points are numbered over all stages. In a pipeline the products wait for `finish`: those
    before a stage's end need what the next stage has found.
    """

    def __init__(self, summing: Summing, errors: OptionErrors, costs: Costs):
        self._errors, self._costs = errors, costs
        self._hidden, self._first = summing.points[0].hidden, summing.first
        self._stages = summing.stages
        self._following = following_of(summing.everywhere)
        self._before = {after: number for number, after in self._following.items()}
        self._behind: dict[int, Tensor] = {}  # sync point -> its gradient
        self._squares: dict[int, Tensor] = {}  # sync point -> of its difference, a token
        self._waiting: list[tuple[int, Tensor, Tensor]] = []

    def watch(self, number: int, partial: Tensor, total: Tensor) -> None:
        """Wait for the gradient of a sum."""
        if not total.requires_grad:  # the first one: all that comes after hangs on it
            total.requires_grad_()
        partial = partial.detach()
        total.register_hook(lambda gradient: self._take(number, partial, gradient))

    def finish(self) -> None:
        """After a backward pass: what waited, from the last stage to the first."""
        for turn in reversed(range(self._stages.count)):
            if turn == self._stages.number:
                for found in self._waiting:
                    self._add(*found)
            if self._stages.count > 1:
                here = [{n: x.cpu() for n, x in d.items()} for d in (self._behind, self._squares)]
                self._behind, self._squares = self._stages.shared(here, source=turn)

    def _take(self, number: int, partial: Tensor, gradient: Tensor) -> None:
        if self._stages.count > 1:
            self._waiting.append((number, partial, gradient))
        else:
            self._add(number, partial, gradient)

    def _add(self, at: int, partial: Tensor, gradient: Tensor) -> None:
        own = repaired = gradient.double().flatten(0, -2)
        later, number = torch.zeros_like(own[:, 0]), self._first + at
        if number in self._following:  # hooks run from the last sync point to the first
            repaired = own - self._behind.pop(self._following[number]).to(own.device)
            later = self._squares.pop(self._following[number]).to(own.device)
        if number in self._before:
            self._behind[number] = own
            self._squares[number] = repaired.square().sum(dim=1) / self._hidden
        nats, missed, energy = self._costs.nats, self._costs.missed, None
        for column, *both in self._errors.at(at, partial):
            for kind, error in zip((PARTIALS, SUMS), both, strict=True):
                squares = error.square().sum(dim=1)
                energy = squares if energy is None else energy
                here = nats[kind, :, number, column]
                for way, against in ((PLAIN, own), (CARRIED, repaired)):
                    product = error * against
                    if column == 0:  # all of it is missed
                        product = product.sum(dim=1)
                    here[way] += 0.5 * product.square().sum().cpu()
                here[HANDED_ON] += 0.5 * (squares @ later).cpu()
                missed[kind, number, column] += shares(squares, energy)


def with_direction(costs: Costs) -> Costs:
    """`costs` a token with the part of the errors that has the direction of what is sent."""
    nats = costs.nats.clone()
    missed = costs.missed[:, None, :, 1:]
    noise = costs.nats[:, :HANDED_ON, :, 1:]
    whole = costs.nats[PARTIALS, :HANDED_ON, :, :1]  # of who sends nothing
    nats[:, :HANDED_ON, :, 1:] = (1 - missed) * noise + missed.square() * whole
    return Costs(nats, costs.missed)


def why_no_gradients(model: nn.Module, summing: Summing, sequence: Tensor) -> str:
    """Why a backward pass cannot be, or nothing; it is tried once, each pipeline stage by itself.

    Args:
        model: Its weights loaded.
        summing: How it sums.
        sequence: int64 ``[tokens]``.

    Returns:
        The first rank's reason that has one; call it on every rank.
    """
    reason = _agreed(_by_dtype(model))
    return reason or _agreed(_by_trial(model, summing, sequence))


def _agreed(reason: str) -> str:
    """The first rank's reason that has one: all ranks plan in the same way."""
    return next(filter(None, gather_values(reason)), "")


def _by_dtype(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            return f"{name} is {str(parameter.dtype).removeprefix('torch.')}"
    return ""


def _by_trial(model: nn.Module, summing: Summing, sequence: Tensor) -> str:
    reached: set[int] = set()
    first = summing.points[0].layer

    def watch(number: int, partial: Tensor, total: Tensor) -> None:
        if not total.requires_grad:
            total.requires_grad_()
        # In the first layer nothing that needs a gradient may lie before a sync point.
        if partial.requires_grad or summing.points[number].layer == first:
            total.register_hook(lambda gradient: reached.add(number))

    try:
        with _frozen(model), summing.watching(watch), by_stage(model), torch.enable_grad():
            forward(model, sequence[None]).float().sum().backward()
    except RuntimeError as error:  # what torch raises for this has no class of its own
        text = " ".join(str(error).split())
        if isinstance(error, NotImplementedError) or any(word in text for word in _WORDS):
            return text[:200]
        raise
    for number, point in enumerate(summing.points):
        if number not in reached:
            return f"no gradient goes through {point}"
    return ""


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
    noise = -uniform.log_().neg_().log_()[:, entries]  # in place: all of the vocabulary
    drawn = lm.top1(seen + noise.to(out.device), group=group)
    out.backward(lm.log_likelihood_gradient(seen, drawn, group=group))


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
