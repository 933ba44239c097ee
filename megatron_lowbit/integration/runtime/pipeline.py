"""A pipeline stage behind the interface of a whole model.

`Pipelined` is called with tokens and gives logits, as a GPTModel does, on every rank. All stages
call it alike, and the last one's logits go to the others, so that loops over a model do not ask
where they run. Where nobody wants logits (`run_each`) Megatron's own schedule keeps them all busy.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.comm.agreement import on_every_rank
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.compat import SYNC_POINTS, require
from megatron_lowbit.integration.runtime.stage_link import HandedOn, Link, Received
from megatron_lowbit.integration.sums.simulate import find_summing
from megatron_lowbit.integration.sums.sync_points import transformer_layers
from megatron_lowbit.model.forward import arguments, logits
from megatron_lowbit.model.stages import WHOLE, Stages
from megatron_lowbit.model.summing import Placed, Summing

# Sequences in a row for each stage: then the stages idle in a fifth of the time.
_IN_FLIGHT = 4

Arguments = tuple[Tensor, Tensor, Tensor]  # tokens, positions and mask, as models take them


def stages_of() -> Stages:
    """The pipeline stages that Megatron was initialized with."""
    from megatron.core import parallel_state

    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return WHOLE
    return Stages(parallel_state.get_pipeline_model_parallel_group())


def whole_model(stage: nn.Module, vocabulary: int) -> nn.Module:
    """`stage` as a model that gives logits on every rank; as it is where there is one stage.

    Args:
        stage: This rank's part of the model, its weights loaded.
        vocabulary: Entries of the vocabulary on this rank, padding included.
    """
    stages = stages_of()
    return stage if stages.group is None else Pipelined(stage, stages, vocabulary)


class Pipelined(nn.Module):
    """The stages of a model as one: see `whole_model`."""

    def __init__(self, stage: nn.Module, stages: Stages, vocabulary: int):
        super().__init__()
        self.stage = stage
        self._stages, self._vocabulary = stages, vocabulary
        self._last, self._is_alone = stages.count - 1, False

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """``[batch, seq_length, vocabulary / ranks]`` logits in fp32, on every stage.

        A backward pass from them must be on every stage, too. What counts is what the last stage's
        logits are given.
        """
        link = Link(self.stage, tokens)
        if self._stages.number > 0:
            start = torch.empty(0, requires_grad=torch.is_grad_enabled())
            link.feed(link.made_up() if self._is_alone else Received.apply(start, link))
        out = self.stage(tokens, positions, mask)
        if self._is_alone:
            return out
        if self._stages.number < self._last:
            place = torch.empty(*tokens.shape, self._vocabulary, device=tokens.device)
            return HandedOn.apply(out, link, lambda: self._broadcast(place))
        self._broadcast(out.detach().contiguous())
        return out

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Each stage runs by itself, on made-up activations, and gives what it would hand on."""
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False

    def _broadcast(self, logits: Tensor) -> Tensor:
        group = self._stages.group
        assert group is not None, "there are several stages"
        dist.broadcast(logits, src=dist.get_global_rank(group, self._last), group=group)
        return logits

    def run(self, batches: list[Arguments]) -> None:
        """Run batches of one shape by Megatron's schedule, several of them on their way at once.

        Args:
            batches: The same on every stage.
        """
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        def step(remaining: Iterator[Arguments], stage: nn.Module):
            return stage(*next(remaining)), lambda output, non_loss_data: None  # logits are dropped

        batch, length = batches[0][0].shape
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=self.stage,
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=batch,
            forward_only=True,
            collect_non_loss_data=True,
        )


def at_once(model: nn.Module) -> int:
    """How many sequences `run_each` should be given at least: enough that no stage idles long."""
    return _IN_FLIGHT * model._stages.count if isinstance(model, Pipelined) else 1


@torch.inference_mode()
def run_each(model: nn.Module, sequences: Iterable[Tensor]) -> None:
    """Run sequences, each by itself and in this order, for what is watched and not for logits.

    Args:
        model: From `whole_model`.
        sequences: int64 ``[seq_length]``, all as long.
    """
    if isinstance(model, Pipelined):
        model.run([arguments(model, tokens[None]) for tokens in sequences])
        return
    for tokens in sequences:
        logits(model, tokens[None])


def summing_of_stages(
    model: nn.Module, simulate_tp: int | None, index: CalibrationIndex | None = None
) -> tuple[Summing, dict[str, str]]:
    """As `find_summing`, with what the other stages have; call it on every rank.

    Raises:
        LowbitError: On every rank: a stage has no layer, or see `find_summing`.
    """
    stages = stages_of()

    def find() -> tuple[Summing, dict[str, str]]:
        require(SYNC_POINTS)
        if stages.count > 1 and not transformer_layers(model):
            raise LowbitError(
                f"pipeline stage {stages.number} of {stages.count} has no layer: choose a split "
                "that gives each stage one"
            )
        return find_summing(model, simulate_tp, index)

    summing, native = on_every_rank(find)
    if stages.count == 1:
        return summing, native
    here = [Placed(point.layer, point.name, point.chunk, point.apart) for point in summing.points]
    everywhere: list[Placed] = []
    for places, names in stages.gather((here, native)):
        everywhere += places
        native |= names
    summing.stages, summing.everywhere = stages, everywhere
    summing.first = everywhere.index(here[0])
    return summing, native
