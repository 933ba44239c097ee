#!/usr/bin/env python3
"""Score a file of texts with a Megatron checkpoint, in low bits: every token's log-probability.

Run it under torchrun with as many ranks as the tensor-parallel size, or a multiple of it: then
data-parallel ranks share the texts. The vocabulary stays split over ranks. All texts are scored
natively, too, and what low bits change is printed as reinforcement learning measures it.

example:
  torchrun --nproc-per-node 3 examples/score.py --load CKPT --data TEXTS.jsonl --lowbit-tp-comm

Every other argument goes to Megatron (e.g. --bf16, --tensor-model-parallel-size); the model's
shape, tokenizer and tensor-parallel size are read from the checkpoint.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs from a plain checkout

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_lowbit import cli
from megatron_lowbit.comm.agreement import on_every_rank
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.inputs import prefix_of
from megatron_lowbit.files import check_output, write_atomic
from megatron_lowbit.integration.arguments import (
    add_lowbit_args,
    apply_from_args,
    index_dir_from_args,
)
from megatron_lowbit.integration.loops.checks import refuse_pipeline
from megatron_lowbit.integration.runtime import session
from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args
from megatron_lowbit.json_files import parse_json
from megatron_lowbit.model import logits as lm
from megatron_lowbit.model.language_model import LanguageModel


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and Megatron's."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help='.txt, or .jsonl of {"text": ...}')
    add("--batch-size", type=cli.positive, default=4, metavar="N", help="texts, default: 4")
    add("--output", type=Path, metavar="FILE", help="JSON: each text's log-probabilities")
    add_lowbit_args(parser)
    return parser.parse_known_args()


def read_texts(path: Path) -> list[str]:
    """A text a line; empty lines are none."""
    texts = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise LowbitError(f"{path} is not UTF-8 ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        texts.append(_json_text(line, f"{path}:{number}") if path.suffix == ".jsonl" else line)
    if not texts:
        raise LowbitError(f"{path} has no text")
    return texts


def _json_text(line: str, where: str) -> str:
    value = parse_json(line, where)
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise LowbitError(f'{where}: no JSON object with a "text"')
    return text


def tokens_of(texts: list[str], model: LanguageModel) -> list[Tensor]:
    """The texts' tokens; a text begins with the tokenizer's prefix, and is cut on the right."""
    ids = [[*model.prefix, *model.tokenize(text)] for text in texts]
    for number, one in enumerate(ids):
        if len(one) < 2:
            raise LowbitError(f"text {number + 1} has {len(one)} tokens: a score needs 2")
    long = sum(len(one) > model.max_length for one in ids)
    if long:
        cli.say(f"{long} of {len(ids)} texts are cut to the model's {model.max_length} positions")
    return [torch.tensor(one[: model.max_length]) for one in ids]


def score(rows: list[Tensor], model: LanguageModel) -> list[Tensor]:
    """fp32 log-probabilities of each text's tokens but the first, in nats; one batch."""
    logits = model.logits(pad_sequence(rows, batch_first=True))
    scores = []
    for row, part in zip(rows, logits, strict=True):
        log_probs = lm.log_softmax(
            part[: len(row) - 1], vocab_size=model.vocab_size, group=model.tp_group
        )
        targets = row[1:].to(log_probs.device)
        scores.append(-lm.negative_log_likelihood(log_probs, targets, group=model.tp_group).cpu())
    return scores


def score_all(
    rows: list[Tensor], model: LanguageModel, size: int, dp_group: dist.ProcessGroup
) -> tuple[list[Tensor], float]:
    """Scores of all texts, the same on every rank, and tokens a second."""
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))  # alike lengths together
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    score([rows[n] for n in batches[0]], model)  # warm-up
    dist.barrier()
    start = time.perf_counter()
    mine: dict[int, Tensor] = {}
    for batch in batches[dist.get_rank(dp_group) :: dist.get_world_size(dp_group)]:
        mine |= dict(zip(batch, score([rows[n] for n in batch], model), strict=True))
    dist.barrier()
    seconds = time.perf_counter() - start
    parts: list[dict] = [{}] * dist.get_world_size(dp_group)
    dist.all_gather_object(parts, mine, group=dp_group)
    found = {number: one for part in parts for number, one in part.items()}
    return [found[number] for number in range(len(rows))], sum(map(len, rows)) / seconds


def mismatch(native: list[Tensor], low: list[Tensor]) -> dict[str, float]:
    """Differences of the tokens' log-probabilities, in nats.

    ``kl`` is the estimate from the tokens alone that reinforcement learning uses (Schulman's k3):
    the divergence from native, if native communication had drawn the texts.
    """
    change = torch.cat(low).double() - torch.cat(native).double()
    return {
        "mean": change.abs().mean().item(),
        "max": change.abs().max().item(),
        "kl": (change.exp() - 1 - change).mean().item(),
    }


def write(output: Path, result: dict[str, Any], scores: list[Tensor]) -> None:
    """All results, by rank 0."""
    if cli.RANK == 0:
        content = {**result, "log_probabilities": [row.tolist() for row in scores]}
        write_atomic(output, (json.dumps(content, indent=1) + "\n").encode())


def load(args: argparse.Namespace) -> tuple[torch.nn.Module, LanguageModel]:
    """The model, and what measures see of it."""
    from megatron.core import parallel_state

    tokenizer = session.build_tokenizer(args, special_tokens=False)
    prefix = prefix_of(session.build_tokenizer(args).tokenize, tokenizer.tokenize)
    chunk = session.load_model(args)
    group = parallel_state.get_tensor_model_parallel_group()
    return chunk, session.language_model(args, chunk, tokenizer, group=group, prefix=prefix)


def measure(
    rows: list[Tensor], chunk: torch.nn.Module, model: LanguageModel, options: argparse.Namespace
) -> tuple[dict[str, Any], list[Tensor]]:
    """Score natively, switch to low bits, score again, say what came out."""
    from megatron.core import parallel_state

    dp_group = parallel_state.get_data_parallel_group()
    native, speed = score_all(rows, model, options.batch_size, dp_group)
    tokens = sum(map(len, rows))
    cli.say(f"native: {len(rows)} texts, {tokens} tokens, {speed:.0f} tokens a second")
    result: dict[str, Any] = {"texts": len(rows), "tokens": tokens, "native_speed": speed}
    handle = apply_from_args(chunk, options)
    if handle is None:
        cli.say("> native communication")
        return {"communication": "native", **result}, native
    scores, speed = score_all(rows, model, options.batch_size, dp_group)
    found = mismatch(native, scores)
    cli.say(
        f"low bits: {speed:.0f} tokens a second; a token's log-probability against native, in "
        f"nats: mean {found['mean']:.4f}, maximum {found['max']:.4f}, KL {found['kl']:.6f}"
    )
    return {"communication": str(handle), **result, "speed": speed, "mismatch": found}, scores


def main() -> None:
    """Read, load, score, write."""
    options, megatron_argv = parse()
    texts = read_texts(options.data)
    index_dir_from_args(options)  # what is wrong with it should not wait for the checkpoint
    if options.output:
        check_output(options.output)
    args = parse_megatron_args(["--load", options.load, *megatron_argv])
    refuse_pipeline(args)
    session.initialize(args)
    chunk, model = load(args)
    rows = on_every_rank(lambda: tokens_of(texts, model))
    result, scores = measure(rows, chunk, model, options)
    if options.output:
        on_every_rank(lambda: write(options.output, result, scores))
    session.shutdown()


if __name__ == "__main__":
    cli.run(main)
