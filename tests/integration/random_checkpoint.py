"""A checkpoint of random weights: random_checkpoint.py DIRECTORY MEGATRON_ARGUMENTS..."""

import sys
from pathlib import Path

from megatron_lowbit.integration.runtime import session
from megatron_lowbit.integration.runtime.checkpoint import TRACKER
from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args


def save(directory: Path, *argv: str):
    """Its model, which is saved in `directory`."""
    args = parse_megatron_args(list(argv))
    session.initialize(args)
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    model = session.load_model(args)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
    state["model"] = unwrap_model(model).sharded_state_dict()
    (directory / "release").mkdir(parents=True)
    dist_checkpointing.save(state, str(directory / "release"))
    (directory / TRACKER).write_text("release")
    session.shutdown()
    return model


if __name__ == "__main__":
    save(Path(sys.argv[1]), *sys.argv[2:])
