#!/usr/bin/env python3
"""Generate text from a Megatron checkpoint with its static inference engine, in BF16 or low bits.

Run it under torchrun with as many ranks as the tensor-parallel size.

example:
  torchrun --nproc-per-node 3 examples/generate.py --load CKPT --prompts "The sea was" \\
      --lowbit-tp-comm

Every other argument goes to Megatron (e.g. --bf16, --tensor-model-parallel-size); the model's
shape, tokenizer and tensor-parallel size are read from the checkpoint.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs from a plain checkout

from megatron_lowbit import cli
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.arguments import (
    add_lowbit_args,
    apply_from_args,
    index_dir_from_args,
)
from megatron_lowbit.integration.runtime import session
from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args
from megatron_lowbit.integration.runtime.text_generation import generate


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, under the names of Megatron's own inference examples, and Megatron's."""
    parser = cli.parser(__doc__)
    parser.add_argument("--prompts", nargs="+", default=[], metavar="TEXT")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="one prompt a line")
    parser.add_argument(
        "--num-tokens-to-generate", type=cli.positive, default=30, metavar="N", help="default: 30"
    )
    parser.add_argument("--top_k", type=int, default=1, help="1 is greedy (default), 0 is off")
    parser.add_argument(
        "--top_p", type=float, default=0.0, help="0 is off (default); needs --top_k 0"
    )
    parser.add_argument("--temperature", type=cli.positive_number, default=1.0, help="default: 1")
    add_lowbit_args(parser)
    return parser.parse_known_args()


def read_prompts(options: argparse.Namespace) -> list[str]:
    """Prompts of the command line, then of the file."""
    prompts = list(options.prompts)
    if options.prompt_file:
        try:
            lines = options.prompt_file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise LowbitError(f"{options.prompt_file} is not UTF-8 ({error})") from None
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise LowbitError("no prompt: pass --prompts TEXT or --prompt-file FILE")
    return prompts


def check_sampling(options: argparse.Namespace) -> None:
    """Raise LowbitError for what Megatron would assert in the middle of a request."""
    top_k, top_p = options.top_k, options.top_p
    if top_k < 0:
        raise LowbitError(f"--top_k {top_k}: give 1 or more, or 0 for off")
    if not 0 <= top_p <= 1:
        raise LowbitError(f"--top_p {top_p}: give 0 to 1, 0 for off")
    if top_k and top_p:
        raise LowbitError(f"--top_p {top_p} and --top_k {top_k} exclude each other: add --top_k 0")


def main() -> None:
    """Load, switch to low bits if asked to, generate, print."""
    options, megatron_argv = parse()
    prompts = read_prompts(options)
    check_sampling(options)
    index_dir_from_args(options)  # what is wrong with it should not wait for the checkpoint
    args = parse_megatron_args(["--load", options.load, *megatron_argv])
    if options.top_k >= args.padded_vocab_size:
        raise LowbitError(
            f"--top_k {options.top_k} is not below the vocabulary's {args.padded_vocab_size}"
        )
    session.initialize(args)
    tokenizer, model = session.build_tokenizer(args), session.load_model(args)
    if apply_from_args(model, options) is None:
        cli.say("> native communication")
    results = generate(
        args,
        model,
        tokenizer,
        prompts,
        tokens=options.num_tokens_to_generate,
        top_k=options.top_k,
        top_p=options.top_p,
        temperature=options.temperature,
    )
    for prompt, result in zip(prompts, results, strict=True):
        cli.say(f"{prompt}[{result.text}]")
    session.shutdown()


if __name__ == "__main__":
    cli.run(main)
