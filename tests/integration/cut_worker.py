"""The command calibrate on a model whose last layer has an MLP that does not differentiate."""

import sys

import torch

from megatron_lowbit import cli
from megatron_lowbit.integration.loops import calibrate_checkpoint, calibrate_command


def cut(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, of whose stages one has the layer."""
    for layer in model.modules():
        if getattr(layer, "layer_number", 0) == 4 and hasattr(layer, "mlp"):
            layer.mlp.linear_fc1.forward = torch.no_grad()(layer.mlp.linear_fc1.forward)
    return model


def main() -> None:
    load = calibrate_checkpoint.session.load_whole_model
    calibrate_checkpoint.session.load_whole_model = lambda args: cut(load(args))
    calibrate_command.main(sys.argv[1:])


if __name__ == "__main__":
    cli.run(main)
