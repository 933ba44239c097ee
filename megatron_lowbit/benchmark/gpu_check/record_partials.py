"""Saves a model's partials for the last stage, where Megatron is (`saved_partials`).

The first and the last layers of a checkpoint, as three simulated ranks have them, of a text that
the tables do not come from: their statistics are those of another text.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_lowbit import cli
from megatron_lowbit.benchmark.codecs.codec_cases import own_tables
from megatron_lowbit.benchmark.gpu_check.gpu_stages import PARTIALS
from megatron_lowbit.benchmark.gpu_check.saved_partials import (
    BITS,
    CODEC,
    MOST_BYTES,
    Saved,
    chain,
    digest,
    metadata,
    tensors,
)
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import check_output, in_checkout, write_atomic
from megatron_lowbit.kernels.switches import disabled
from megatron_lowbit.model.summing import Summing

RANKS, TOKENS, LAYERS = 3, 512, 3  # the first and the last three layers
_TABLES_OF, _SAVED_OF = "examples/data/emma.txt", "examples/data/persuasion.txt"


def run(checkpoint: Path) -> None:
    """Load the model, run both texts through it and write the file.

    Raises:
        LowbitError: The checkpoint cannot be loaded, or its partials do not fit the file.
    """
    check_output(PARTIALS, "--save-partials")
    texts = [in_checkout(name) for name in (_TABLES_OF, _SAVED_OF)]
    names, seen = _recorded(checkpoint, texts)
    write(make(names, *seen), PARTIALS)


def make(names: list[str], calibrated: list[Tensor], partials: list[Tensor]) -> Saved:
    """What the file is to have.

    Args:
        names: Of the sync points.
        calibrated: Floating point ``[ranks, tokens, hidden]`` of each, for its tables.
        partials: BF16 ``[ranks, tokens, hidden]`` of each, as many tokens in all.
    """
    codec = get_codec(CODEC, bits=BITS)
    saved = Saved(names, partials, [own_tables(codec, values) for values in calibrated], [])
    with disabled():
        digests = [digest(made) for made in chain(saved, torch.device("cpu"))]
    return Saved(names, saved.partials, saved.tables, digests)


def write(saved: Saved, path: Path) -> None:
    """Write the file.

    Raises:
        LowbitError: It would be larger than `MOST_BYTES`.
    """
    from safetensors.torch import save

    data = save(tensors(saved), metadata(saved))
    if len(data) > MOST_BYTES:
        raise LowbitError(
            f"the partials have {len(data):,} bytes, {MOST_BYTES:,} are allowed: take a smaller "
            "model"
        )
    write_atomic(path, data)
    ranks, tokens, hidden = saved.partials[0].shape
    what = f"{len(saved.names)} sync points, {ranks} ranks, {tokens} x {hidden}"
    cli.say(f"written: {path}, {what}, {len(data) / 1e6:.1f} MB")


def _recorded(checkpoint: Path, texts: Sequence[Path]) -> tuple[list[str], list[list[Tensor]]]:
    """Names of the sync points, and for each text the partials of each."""
    from megatron_lowbit.integration.loops.checks import check_length, megatron_argv
    from megatron_lowbit.integration.runtime import session
    from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args
    from megatron_lowbit.integration.sums.simulate import find_summing

    args = parse_megatron_args(megatron_argv(["--load", str(checkpoint)], RANKS))
    check_length(args, TOKENS)
    session.initialize(args)
    tokenize = session.build_tokenizer(args).tokenize
    model = session.load_model(args)
    summing, _ = find_summing(model, RANKS)
    layers = sorted({point.layer for point in summing.points})
    wanted = {*layers[:LAYERS], *layers[-LAYERS:]}
    places = [n for n, point in enumerate(summing.points) if point.layer in wanted]
    seen = []
    for text in texts:
        tokens = tokenize(text.read_text(encoding="utf-8")[: 16 * TOKENS])[:TOKENS]
        if len(tokens) < TOKENS:
            raise LowbitError(f"{text} has {len(tokens)} tokens, {TOKENS} are needed")
        seen.append(_partials(model, summing, torch.tensor([tokens]), places))
    session.shutdown()
    return [str(summing.points[n]) for n in places], seen


def _partials(
    model: nn.Module, summing: Summing, tokens: Tensor, places: list[int]
) -> list[Tensor]:
    """BF16 ``[ranks, tokens, hidden]`` of each sync point in `places`, in the model's order."""
    from megatron_lowbit.model.forward import device_of, logits

    found: dict[int, Tensor] = {}

    def watch(found: dict[int, Tensor], place: int, partials: Tensor, total: Tensor) -> None:
        if place in places:
            found[place] = partials.flatten(1, -2).to("cpu", torch.bfloat16)

    with torch.no_grad(), summing.watching(partial(watch, found)):
        logits(model, tokens.to(device_of(model)))
    return [found[place] for place in places]
