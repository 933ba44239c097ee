"""Tokens through a Megatron model: what calibration and evaluation share."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


@torch.inference_mode()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """`forward` without a graph."""
    return forward(model, tokens)


def forward(model: nn.Module, tokens: Tensor) -> Tensor:
    """Vocabulary-parallel logits.

    Args:
        model: A GPTModel, wrapped or not; of a pipeline what makes its stages one.
        tokens: int64 ``[batch, seq_length]``, on any device.

    Returns:
        ``[batch, seq_length, vocabulary / ranks]``, this rank's part.
    """
    return model(*arguments(model, tokens))


def by_stage(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which each stage of a pipeline runs by itself, on made-up activations.

    One that fails then leaves no other waiting. `forward` gives what it would hand on, or logits.
    """
    return model.alone() if hasattr(model, "alone") else nullcontext()


def arguments(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `forward` gives a model for `tokens`: these, their positions and the causal mask."""
    device = device_of(model)
    positions = torch.arange(tokens.shape[1], device=device)
    # True = masked. Megatron's own default is made on CUDA, whatever the model is on.
    mask = (positions[:, None] < positions[None, :])[None, None]
    return tokens.to(device), positions.expand_as(tokens), mask
