"""What goes from pipeline stage to pipeline stage: activations, and in a backward pass gradients.

Megatron's own schedules start from a loss that only the last stage has. Here every stage has the
logits, so the sending is part of autograd's graph: a backward pass from them on all stages receives
a stage's gradients from the next one and sends its own to the one before.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Link:
    """One pass of one stage.

    Args:
        stage: Its part of the model.
        tokens: int64 ``[batch, seq_length]``.
    """

    def __init__(self, stage: nn.Module, tokens: Tensor):
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
        from megatron.core.utils import get_model_config

        config = get_model_config(stage)
        batch, length = tokens.shape
        if config.sequence_parallel:
            length //= parallel_state.get_tensor_model_parallel_world_size()
        self._stage, self._shape = stage, (length, batch, config.hidden_size)
        self._dtype, self._device = config.pipeline_dtype, tokens.device
        group = parallel_state.get_pipeline_model_parallel_group()
        self._communicator = P2PCommunicator(group, config)

    def feed(self, activations: Tensor) -> None:
        """Let the stage begin with `activations`."""
        from megatron.core.utils import get_attr_wrapped_model

        get_attr_wrapped_model(self._stage, "set_input_tensor")([activations])

    def made_up(self) -> Tensor:
        """Activations that no stage has sent, the same on every rank."""
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(self._shape, generator=generator)
        values = values.to(self._device, self._dtype)
        return values.requires_grad_(torch.is_grad_enabled())

    def receive(self, *, backward: bool = False) -> Tensor:
        """What the stage before sent, or the gradients of the next one."""
        if backward:
            return self._communicator.recv_backward(self._shape, is_last_stage=False)
        return self._communicator.recv_forward(self._shape, is_first_stage=False)

    def send(self, values: Tensor, *, backward: bool = False) -> None:
        """Send the next stage activations, or the one before gradients."""
        values = values.contiguous()
        if backward:
            self._communicator.send_backward(values, is_first_stage=False)
        else:
            self._communicator.send_forward(values, is_last_stage=False)


class Received(torch.autograd.Function):
    """The activations of the stage before; backward sends it their gradients."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, link: Link) -> Tensor:
        """`start` is what makes a graph begin here, if it needs gradients."""
        ctx.link = link
        return link.receive().detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        """The gradients of the activations."""
        ctx.link.send(gradients[0], backward=True)
        return None, None


class HandedOn(torch.autograd.Function):
    """The last stage's logits, once the next stage has this one's activations."""

    @staticmethod
    def forward(ctx: Any, activations: Tensor, link: Link, logits: Any) -> Tensor:
        """`logits` waits for them."""
        ctx.link = link
        link.send(activations)
        return logits()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        """Whatever gradients these logits are given, the next stage has those that count."""
        return ctx.link.receive(backward=True), None, None
