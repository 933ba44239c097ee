"""Convert a model from Hugging Face or GGUF into a Megatron-core checkpoint."""

from __future__ import annotations

import argparse

from megatron_lowbit import cli

EPILOG = """\
Supported: Llama (GGUF files too), Mistral, Qwen2, Qwen3 and Gemma (the first), with sliding windows
and Llama-3 rope scaling. A setting that is not understood is refused by name, and so is a model
whose files are damaged, whose weights are not what its config says, or that asks for code of its
own: no code of a model is ever run.
The checkpoint can be loaded at any tensor-parallel size that divides the heads and KV heads.
Runs in one process on the CPU and needs memory for the weights once (a GGUF file: once more in
fp32). What is already at --save is replaced only when the new checkpoint is complete.

example:
  python -m megatron_lowbit convert --model SmolLM2-135M-Instruct.Q4_1.gguf --save smollm2 \\
      --tensor-model-parallel-size 3
"""


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.described(__doc__)
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="Hugging Face model directory or .gguf file")
    add("--save", required=True, metavar="DIR", help="directory of the checkpoint to write")
    add(
        "--tensor-model-parallel-size",
        type=cli.positive,
        default=1,
        metavar="N",
        help="size to record and to pad the vocabulary for (default: 1)",
    )
    add(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="of the stored weights (default: bf16)",
    )
    add(
        "--hybrid",
        action="store_true",
        help="a checkpoint of Megatron's HybridModel instead of GPTModel (megatron-core 0.19 and "
        "newer)",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Convert, and print how to load the result."""
    options = parse(argv)
    from megatron_lowbit.integration.convert import conversion, translate

    args = conversion.convert(
        options.model,
        save=options.save,
        tensor_parallel=options.tensor_model_parallel_size,
        dtype=options.dtype,
        hybrid=options.hybrid,
        progress=True,
    )
    print(f"wrote {options.save}; to load it:")
    print("  " + translate.load_flags(args, options.save))
    if options.hybrid:
        print("  (Megatron's own scripts want --model-provider hybrid, too)")
    if len(args.eos_token_ids or ()) > 1:
        stops = ", ".join(map(str, args.eos_token_ids))
        print(
            f"  (examples/generate.py stops at each of the tokens {stops}; Megatron's own engines"
        )
        print("  at the tokenizer's end of text only)")
    if translate.unsayable(args):
        print(
            f"  (only through megatron_lowbit: Megatron's command line cannot say "
            f"{translate.unsayable(args)})"
        )
