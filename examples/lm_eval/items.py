#!/usr/bin/env python3
"""Write the items of the paper's tasks as JSON lines, for the task files beside this script.

An item is {"context", "choices", "gold"}; of WinoGrande {"contexts", "continuation", "gold"}. The
order is that of tools/evaluate.py --tasks, so the first N are the items of its --limit N. It says
how many of the first N are longer than --seq-length, since the harness cuts them without a word.

example:
  examples/lm_eval/items.py out/lm_eval --limit 100 --seq-length 2048 --tokenizer CKPT/tokenizer
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also runs from a plain checkout

from megatron_lowbit import cli
from megatron_lowbit.evaluation.measures.task_data import TASKS, Item, read_task
from megatron_lowbit.files import write_atomic
from megatron_lowbit.integration.convert.hf_source import saved_tokenizer


def parse() -> argparse.Namespace:
    """Our arguments."""
    parser = cli.described(__doc__)
    add = parser.add_argument
    add("directory", type=Path, metavar="DIRECTORY", help="where the files go")
    add("--limit", type=cli.positive, required=True, metavar="N", help="items that will be asked")
    add("--seq-length", type=cli.positive, required=True, metavar="N", help="tokens of an input")
    add("--tokenizer", type=Path, required=True, metavar="DIR", help="Hugging Face's files")
    return parser.parse_args()


def row(item: Item) -> dict:
    """What a line of a file holds; the space before a choice is lm-eval's target_delimiter."""
    choices = [text.removeprefix(" ") for text in item.continuations]
    if len(set(item.contexts)) > 1:  # partial evaluation
        return {"contexts": item.contexts, "continuation": choices[0], "gold": item.gold}
    return {"context": item.contexts[0], "choices": choices, "gold": item.gold}


def main() -> None:
    """Write a file for each task, and count what is too long."""
    options = parse()
    tokenizer = saved_tokenizer(options.tokenizer, "--tokenizer")
    options.directory.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        items = read_task(task).items
        lines = [json.dumps(row(item)) + "\n" for item in items]
        write_atomic(options.directory / f"{task}.jsonl", "".join(lines).encode())
        texts = [
            context + text
            for item in items[: options.limit]
            for context, text in zip(item.contexts, item.continuations, strict=True)
        ]
        long = sum(len(ids) > options.seq_length for ids in tokenizer(texts)["input_ids"])
        if long:
            cli.say(f"{task}: {long} of {len(texts)} inputs are cut to {options.seq_length} tokens")


if __name__ == "__main__":
    cli.run(main)
