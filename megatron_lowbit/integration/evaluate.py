"""Evaluation of a checkpoint under several codecs: what tools/evaluate.py does, step by step.

A variant is named as in the results: a codec (``rotated-hybrid``), a codec and bits
(``rotated-hybrid-3``), a codec and the bits of partials and sums (``rotated-hybrid-4+6``: two-shot,
where the others are one-shot), or one of the paper's baselines made from ``static-hybrid``:
``int4`` (no BF16 index) and ``int4-random`` (as many BF16 features, chosen at random).
"""

import argparse
import json
import math
import random
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megatron_lowbit import cli
from megatron_lowbit.calibration.corpus import read_corpus
from megatron_lowbit.calibration.index import Index
from megatron_lowbit.calibration.index_files import manifest_digest, read_index
from megatron_lowbit.codecs import Codec, Tables, get_codec, parse_codec
from megatron_lowbit.comm.agreement import on_every_rank, require_equal
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.compare import Variant, compare
from megatron_lowbit.files import check_writable, write_atomic
from megatron_lowbit.integration import runtime
from megatron_lowbit.integration.apply import Reducer, check_index
from megatron_lowbit.integration.arguments import INDEX_NAME
from megatron_lowbit.integration.calibrate import check_length, refuse_pipeline
from megatron_lowbit.integration.forward import logits
from megatron_lowbit.integration.megatron_args import parse_megatron_args
from megatron_lowbit.integration.sync_points import Attachment, SyncPoint, find_sync_points

TablesOf = Callable[[Index, SyncPoint, Codec], Tables]


def run(options: argparse.Namespace, megatron_argv: list[str]) -> None:
    """Evaluate as `options` of tools/evaluate.py say, print the table, write the JSON."""
    chosen = {name: parse_variant(name) for name in options.codecs.split(",")}
    args = parse_megatron_args(megatron_argv)
    refuse_pipeline(args)
    runtime.initialize(args)
    index, tokenizer, corpus, sequences = on_every_rank(lambda: _read(args, options))
    require_equal("index or text", (manifest_digest(index.manifest), corpus.sha256))
    model = runtime.load_model(args)
    points, _ = on_every_rank(lambda: find_sync_points(model))
    ranks = dist.get_world_size(points[0].group)
    on_every_rank(lambda: _check(index, model, [codec for codec, _ in chosen.values()], ranks))
    variants = [make_variant(n, points, index, *chosen[n]) for n in chosen]
    size = runtime.vocabulary_size(args, tokenizer)
    native, results = _compare(model, sequences, variants, points, size)
    summary = {
        "model": options.name or Path(options.load).name,
        "tp_size": ranks,
        "tokens": native["tokens"],
        "data": {"files": corpus.names, "sha256": corpus.sha256, "seq_length": options.seq_length},
        "native": {**native, "wire_bytes_per_token": _ring_bytes(points, args.hidden_size)},
        "results": results,
    }
    cli.say(table(summary))
    on_every_rank(lambda: _write(summary, options.output))
    runtime.shutdown()


def _read(args: argparse.Namespace, options: argparse.Namespace) -> tuple:
    """Index, tokenizer, corpus and its sequences, before the model is loaded."""
    check_length(args, options.seq_length)
    if args.tensor_model_parallel_size == 1:
        raise LowbitError("tensor parallel size 1 communicates nothing: nothing to compare")
    if options.output:
        if options.output.is_dir():
            raise LowbitError(f"--output {options.output} is a directory: name a file")
        check_writable(options.output.absolute().parent)
    index = read_index(options.index or Path(options.load) / INDEX_NAME)
    tokenizer = runtime.build_tokenizer(args)
    corpus = read_corpus(options.data, tokenizer.tokenize)
    count = -(-options.tokens // options.seq_length)
    return index, tokenizer, corpus, corpus.first(count, options.seq_length)


def _check(index: Index, model: nn.Module, codecs: list[Codec], ranks: int) -> None:
    for codec in codecs:
        check_index(index, model, codec, ranks)


def parse_variant(name: str) -> tuple[Codec, TablesOf]:
    """The codec of a variant's name, and how its tables are made.

    Raises:
        LowbitError: Unknown codec or number of bits.
    """
    if name == "int4":
        return get_codec("static-hybrid"), _tables_with(lambda index, point, k: [])
    if name == "int4-random":
        return get_codec("static-hybrid"), _tables_with(_random_features)
    codec = parse_codec(name)
    return codec, lambda index, point, codec: index.tables(
        point.layer, point.name, codec, ranks=index.tp_size
    )


def _collective(name: str) -> str:
    """By which collective a variant is measured: two-shot where its name has bits of the sum."""
    return "two-shot" if "+" in name else "one-shot"


def make_variant(
    name: str, points: list[SyncPoint], index: Index, codec: Codec, tables_of: TablesOf
) -> Variant:
    """A variant that switches all `points` to `codec`."""
    reducers = []
    for point in points:
        tables = tables_of(index, point, codec).to(point.module.weight.device)
        reducers.append(Reducer(codec, tables, point.group, _collective(name)))

    @contextmanager
    def active():
        attachment = Attachment(points, reducers)
        try:
            yield
        finally:
            attachment.remove()

    return Variant(name, active, [reducer.traffic for reducer in reducers])


def table(summary: dict) -> str:
    """The results as a Markdown table."""
    head = ["codec", "bits/value", "perplexity", "loss, nats", "KL, nats", "top-1", "bytes/token"]
    rows = [head, ["---"] * len(head)]
    native = summary["native"]
    rows.append(
        ["native BF16", "16.00", f"{native['perplexity']:.3f}", "0", "0", "100 %"]
        + [f"{native['wire_bytes_per_token']:,.0f}"]
    )
    for result in summary["results"]:
        rows.append(
            [
                result["codec"],
                f"{result['bits_per_value']:.2f}",
                f"{result['perplexity']:.3f}",
                _with_error(result["delta_nll"], result["delta_nll_stderr"]),
                _with_error(result["kl"], result["kl_stderr"]),
                f"{100 * result['top1']:.1f} %",
                f"{result['wire_bytes_per_token']:,.0f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [" | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    files = ", ".join(summary["data"]["files"])
    title = f"{summary['model']}, TP {summary['tp_size']}, {summary['tokens']} tokens of {files}"
    return "\n".join([title, "", *(f"| {line} |" for line in lines)])


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _compare(model: nn.Module, sequences, variants: list[Variant], points, size: int) -> tuple:
    from megatron.core import parallel_state

    return compare(
        sequences,
        lambda tokens: logits(model, tokens),
        variants,
        vocab_size=size,
        tp_group=points[0].group,
        dp_group=parallel_state.get_data_parallel_group(),
        track=cli.progress("evaluating", "sequence"),
    )


def _tables_with(choose: Callable[[Index, SyncPoint, int], list[int]]) -> TablesOf:
    """Tables with the calibrated ranges and another BF16 index."""

    def tables_of(index: Index, point: SyncPoint, codec: Codec) -> Tables:
        count = len(index.bf16_index(point.layer, point.name, codec))
        chosen = choose(index, point, count)
        statistics = index.record(point.layer, point.name).statistics(index.tp_size)
        return codec.tables(
            index.hidden, bf16_index=torch.tensor(chosen, dtype=torch.int64), statistics=statistics
        )

    return tables_of


def _random_features(index: Index, point: SyncPoint, count: int) -> list[int]:
    """The same on every rank and in every run, another choice for each sync point."""
    return random.Random(str(point)).sample(range(index.hidden), count)


def _ring_bytes(points: list[SyncPoint], hidden: int) -> float:
    """What one rank sends for one token in a BF16 ring all-reduce: 2 (N-1)/N of the tensor."""
    ranks = dist.get_world_size(points[0].group)
    return len(points) * 2 * hidden * 2 * (ranks - 1) / ranks


def _write(summary: dict, output: Path | None) -> None:
    if output is None or dist.get_rank() != 0:
        return
    write_atomic(output, json.dumps(_finite(summary), indent=2).encode() + b"\n")


def _finite(value):
    """`value` with null for what is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
