"""Models whose sums are one chain of error feedback, and what tests of chains ask of them."""

from dataclasses import replace
from functools import partial

import small_gpt
import torch
from small_gpt import build

POINTS = 6
# Three layers, whose sync points are one chain if nothing else is done to the model.
build_chain = partial(build, torch.bfloat16, num_layers=POINTS // 2)
index_of = partial(small_gpt.index_of, codec="shaped-hybrid", bf16_features=0)


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
