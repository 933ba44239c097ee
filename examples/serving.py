"""What the two servers share: where to listen, and the checkpoint's model."""

import argparse

import torch

# No Megatron up here: a server's child processes read this file without the launcher.


def add_server_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Where the server listens."""
    group = parser.add_argument_group(title="text generation server")
    group.add_argument("--host", default="127.0.0.1", help="address (default: this machine only)")
    group.add_argument("--port", type=int, default=5000, help="port (default: 5000)")
    return parser


def initialize() -> argparse.Namespace:
    """Megatron's arguments, validated, after its start."""
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron

    args = parse_and_validate_args(
        extra_args_provider=add_server_args,
        args_defaults={"no_load_rng": True, "no_load_optim": True, "micro_batch_size": 1},
    )
    args.exit_on_missing_checkpoint = True
    initialize_megatron()
    return args


def load_model(args: argparse.Namespace) -> torch.nn.Module:
    """The checkpoint's model, built and loaded by Megatron."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.models import GPTModelBuilder

    groups = ProcessGroupCollection.use_mpu_process_groups()
    builder = GPTModelBuilder(gpt_config_from_args(args))
    chunks = builder.build_distributed_models(pg_collection=groups, wrap_with_ddp=False)
    load_checkpoint(chunks, None, None)
    return chunks[0].eval()
