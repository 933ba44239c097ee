"""Megatron's old checkpoint format (`--ckpt-format torch`): one pickle a rank.

Megatron's loader is trusting with it: a file that it cannot read ends the process with status 0,
and weights whose names differ are left as they were, unsaid. So everything is checked first, the
same on every rank, and names are translated and must all be there.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.runtime.quiet import quiet

_FILE = "model_optim_rng.pt"
_PARALLEL = ("tensor", "pipeline", "expert")
_TRUST = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's own switch, read by torch.load


def rank_files(args: argparse.Namespace) -> list[Path]:
    """The pickles of the checkpoint `args.load`; none if it has another format.

    Raises:
        LowbitError: There is no checkpoint where the tracker file says.
    """
    from megatron.training.checkpointing import get_load_checkpoint_path_by_args

    try:
        with quiet():
            directory = Path(get_load_checkpoint_path_by_args(args))
    except (SystemExit, AssertionError) as error:
        raise LowbitError(f"--load {args.load}: its tracker file names no iteration") from error
    if not directory.is_dir():
        raise LowbitError(f"--load {args.load}: it has no {directory.name}, which is its latest")
    return sorted(path / _FILE for path in directory.glob("mp_rank_*"))


def check_files(files: list[Path]) -> None:
    """Raises LowbitError for a file that is damaged or that torch.load would refuse.

    Reads no weights. Megatron registers what its own checkpoints hold as safe to load; whatever
    else a pickle names could run code.
    """
    trusted = os.environ.get(_TRUST, "").lower() in ("1", "y", "yes", "true")
    for file in files:
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise LowbitError(f"{file}: missing or damaged ({reason})") from error
        if unsafe and not trusted:
            raise LowbitError(
                f"{file} holds {min(unsafe)}, which could run code and is not loaded: if you "
                f"trust the file, set {_TRUST}=1, or save it again as torch_dist where it was made"
            )


def check_sizes(files: list[Path], args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Raises LowbitError for a checkpoint of other parallel sizes than `args`, or a missing file.

    `files` are those of `rank_files`, and `saved` the checkpoint's own arguments.
    """
    sizes = {kind: getattr(saved, f"{kind}_model_parallel_size", 1) for kind in _PARALLEL}
    for kind, size in sizes.items():
        wanted = getattr(args, f"{kind}_model_parallel_size")
        if size != wanted:
            raise LowbitError(
                f"--load {args.load}: saved at {kind} parallel size {size} in Megatron's legacy "
                f"format, which cannot be loaded at {wanted}: run it at {size}, or let Megatron "
                "write it anew with --ckpt-convert-format torch_dist"
            )
    ranks = sizes["tensor"] * sizes["pipeline"]
    if sizes["expert"] == 1 and len(files) != ranks:
        raise LowbitError(
            f"--load {args.load}: not a whole checkpoint: {len(files)} of {ranks} ranks' files"
        )


def whole(model: nn.Module, load: str) -> RemovableHandle:
    """A context in which `model` takes a legacy state whole, or not at all.

    Names by which Transformer Engine's fused layers call what local layers have on their own are
    translated, as Megatron does for torch_dist checkpoints.

    Raises:
        LowbitError: From `load_state_dict`, at the first parameter without its like.
    """
    names = dict(_fused_names(model))

    def translate(module, state, *_) -> None:
        for local, fused in names.items():
            if fused in state:
                state[local] = state.pop(fused)
        ours = module.state_dict()
        for name in [name for name in state if name not in ours and _is_extra(name)]:
            del state[name]  # of FP8 training
        odd = {n for n in ours.keys() ^ state.keys() if not _is_extra(n)}
        shared = {n for n in ours.keys() & state.keys() if not _is_extra(n)}
        odd |= {n for n in shared if ours[n].shape != state[n].shape}
        if odd:
            raise LowbitError(
                f"--load {load}: {min(odd)} is not the same in the checkpoint and in the model "
                "that its arguments give: it was saved from other layers or another model"
            )

    return model.register_load_state_dict_pre_hook(translate)


def _is_extra(name: str) -> bool:
    """Whether it is what Transformer Engine keeps beside a layer's parameters."""
    return name.endswith("_extra_state")


def _fused_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Parameters of local layers by name, with the names in fused layers."""
    for path, layer in model.named_modules():
        submodules = getattr(layer, "submodules_config", None)
        renamed = getattr(submodules, "sharded_state_dict_keys_map", None) or {}
        for name, _ in layer.named_parameters():
            for local, fused in renamed.items():
                if name.startswith(local):
                    yield f"{path}.{name}", f"{path}.{fused}{name.removeprefix(local)}"
