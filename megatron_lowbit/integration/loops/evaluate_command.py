r"""Measure what low-bit communication costs a checkpoint, against its native BF16 communication.

Prints a table for each text, and writes all as JSON with --output: perplexity, difference in
negative log-likelihood, KL divergence and top-1 agreement token by token, bits per value from the
real payloads, the bytes that one rank sends per token, and the error at each sync point. On demand
also zero-shot tasks, long contexts and generation. python -m megatron_lowbit report makes a page of
the JSON. Run it under torchrun with as many ranks as the tensor-parallel size, times the stages of
--pipeline-model-parallel-size; or in one process with --simulate-tp, which makes the partials of N
ranks itself (under torchrun its processes then share the work).

examples:
  torchrun --nproc-per-node 3 -m megatron_lowbit evaluate --load CKPT --data TEXT.txt \
      --output summary.json
  python -m megatron_lowbit evaluate --simulate-tp 8 --load CKPT --data TEXT.txt --output s.json
  python -m megatron_lowbit evaluate --simulate-tp 8 --load CKPT --tasks all --limit 200
  torchrun --nproc-per-node 3 -m megatron_lowbit evaluate --load CKPT --data TEXT.txt \
      --long-context 4096 --generate 64

Every other argument goes to Megatron; the model's shape, tokenizer and tensor-parallel size are
read from the checkpoint.
"""

import argparse
from pathlib import Path

from megatron_lowbit import cli


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and Megatron's."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help=".txt or .jsonl, a table for each; for all but tasks",
    )
    add("--index", type=Path, metavar="DIR", help="the calibration index (default: CKPT/lowbit)")
    add(
        "--codecs",
        metavar="LIST",
        help="comma-separated variants, such as recipe@feedback,recipe@feedback@two-shot or, with "
        "bits, rotated-hybrid-3 (megatron_lowbit/evaluation/README.md has all names; default: "
        "the paper's codec and its baselines, rotated- and shaped-hybrid, and what is served by "
        "the calibration index, with error feedback, without it, and two-shot)",
    )
    add(
        "--tokens",
        type=cli.positive,
        default=16384,
        metavar="N",
        help="from the start of each text, rounded up to whole sequences (default: 16384)",
    )
    add("--seq-length", type=cli.positive, default=512, metavar="TOKENS", help="default: 512")
    _add_measures(parser)
    add("--name", help="the model's name in the results (default: from CKPT)")
    add("--output", type=Path, metavar="FILE", help="write the results as JSON")
    add("--resume", action="store_true", help="go on where an interrupted evaluation was")
    cli.add_simulate_tp(parser)
    return parser.parse_known_args(argv)


def _add_measures(parser: argparse.ArgumentParser) -> None:
    """What is measured besides the texts token by token."""
    add = parser.add_argument
    add(
        "--tasks",
        metavar="LIST",
        help="zero-shot tasks, comma-separated: arc-easy, arc-challenge, winogrande, hellaswag, "
        "boolq; or all",
    )
    add("--limit", type=cli.positive, metavar="N", help="items of each task (default: all)")
    add(
        "--long-context",
        type=cli.positive,
        metavar="TOKENS",
        help="loss and KL by position in sequences of so many tokens of the first text, and how "
        "many facts planted in them are found",
    )
    add(
        "--generate",
        type=cli.positive,
        metavar="TOKENS",
        help="generate so many tokens after each of 16 prompts from the first text, and count "
        "those that are native's before the first other one",
    )


def main(argv: list[str]) -> None:
    """Evaluate and report."""
    options, megatron_argv = parse(argv)
    from megatron_lowbit.integration.loops import evaluate_checkpoint

    evaluate_checkpoint.run(options, ["--load", options.load, *megatron_argv])
