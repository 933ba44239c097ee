"""Models whose sums are one chain of error feedback, and what tests of chains ask of them."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from on_ranks import directory_of_all
from small_gpt import LENGTH, VOCAB, build
from torch import nn

from megatron_lowbit.codecs import get_codec

POINTS = 6
DEEP = {"num_layers": POINTS // 2}


def build_chain(**config) -> nn.Module:
    """A model of three layers, whose sync points are one chain if nothing else is done to it."""
    return build(torch.bfloat16, **DEEP, **config)


def index_of(model: nn.Module):
    """A calibration index for `shaped-hybrid` from random tokens."""
    from megatron_lowbit.integration.loops.calibrate_checkpoint import calibrate_model

    index, _ = calibrate_model(
        model,
        torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0)),
        codec=get_codec("shaped-hybrid"),
        bf16_features=0,
        corpus={"sha256": "0"},
        partial=directory_of_all("partial"),
    )
    return index


def chain_of(index) -> list[str]:
    """Why each sync point is outside of the chain, by its index; in the chain it is empty."""
    return list(index.manifest["chain"].values())


def with_chain(index, chain: dict):
    return replace(index, manifest={**index.manifest, "chain": chain})


def without_chain(index):
    """An index of before chains were checked."""
    manifest = {key: value for key, value in index.manifest.items() if key != "chain"}
    return replace(index, manifest=manifest)


def reasons(handle) -> list[str]:
    """What `status()` says of feedback at each sync point."""
    return [status.feedback for status in handle.status()]


def rule(match: str, **values) -> Path:
    """A file with one rule, of this rank."""
    path = directory_of_all("rules") / f"rules{dist.get_rank()}.json"
    path.write_text(json.dumps([{"match": match, **values}]))
    return path
