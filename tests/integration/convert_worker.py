"""What test_convert.py runs in processes of its own: Megatron is slow to import and sets globals.

    convert_worker.py convert DIR                 converts every model, collects parser errors
    convert_worker.py load DIR                    loads checkpoints at TP 1 and TP 3; of 3 ranks

Both leave their results in DIR, for the tests to look at.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import torch

# The models of tiny_models.py, which is not imported here: it imports transformers.
FAMILIES = ("mistral", "qwen2", "qwen2-tied", "qwen3", "gemma", "gemma-untied")
# Checkpoint directory: its model, and the tensor-parallel size it is made for.
CHECKPOINTS = {
    "tied-tp1": ("tied", 1),
    "tied-tp3": ("tied", 3),
    "untied-tp3": ("untied", 3),
    "stopping-ckpt": ("stopping", 1),
    **{f"{name}-ckpt": (name, 1) for name in FAMILIES},
}
# The same for Megatron's HybridModel: its model.
HYBRIDS = {f"{name}-hybrid": name for name in ("tied", "mistral", "qwen3", "gemma")}
# These replace what another conversion wrote: a stale file would give other logits.
REPLACED = "replaced"
BF16 = "gemma-bf16"
# Checkpoint, and the tensor-parallel size it is loaded at.
LOADS = (
    ("tied-tp1", 3),
    ("tied-tp3", 3),
    ("untied-tp3", 1),
    ("untied-tp3", 3),
    (REPLACED, 1),
    ("stopping-ckpt", 3),
    *((f"{name}-ckpt", size) for name in FAMILIES for size in (1, 3)),
    *zip(HYBRIDS, (1, 3, 1, 3), strict=True),
)
# What tokenizers treat differently: runs of spaces, lines, other scripts, special tokens in a text.
TEXTS = ["two  spaces\n\nand lines\t", "naïve café 中文 🙂", "a <bos> <|im_end|> b", "f(x):\n    x"]
PROMPTS = ["the quick brown fox", "a model of the world is"]
NEW_TOKENS = 6


def convert_all(directory: Path) -> None:
    """Converts at every size, the last over an existing checkpoint, and tries wrong arguments."""
    from megatron_lowbit.integration.convert.conversion import convert
    from megatron_lowbit.integration.convert.translate import load_flags

    results = {}
    for save, (name, size) in CHECKPOINTS.items():
        args = convert(directory / name, save=directory / save, tensor_parallel=size, dtype="fp32")
        results[save] = load_flags(args, directory / save)
    for save, name in HYBRIDS.items():
        convert(directory / name, save=directory / save, dtype="fp32", hybrid=True)
    for dtype in ("bf16", "fp32"):
        convert(directory / "tied", save=directory / REPLACED, dtype=dtype)
    convert(directory / "gemma", save=directory / BF16, dtype="bf16")
    results["siblings"] = sorted(path.name for path in directory.iterdir())
    results["errors"] = parser_errors(directory)
    results["lowbit"] = lowbit_arguments(directory)
    (directory / "converted.json").write_text(json.dumps(results))


def lowbit_arguments(directory: Path) -> dict:
    """Our argument group in Megatron's own parser."""
    from megatron_lowbit.integration.arguments import add_lowbit_args
    from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args

    argv = ["--load", str(directory / "tied-tp1"), "--lowbit-tp-comm", "--lowbit-bits", "3"]
    args = parse_megatron_args(argv, extra_args_provider=add_lowbit_args)
    return {name: value for name, value in vars(args).items() if name.startswith("lowbit")}


def parser_errors(directory: Path) -> dict[str, str]:
    """The message each wrong command line gets."""
    from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args

    load = ["--load", str(directory / "tied-tp3")]
    cases = {
        "missing": ["--load", str(directory / "absent")],
        "empty": ["--load", str(directory)],
        "unknown": [*load, "--no-such-argument", "1"],
        "value": [*load, "--tensor-model-parallel-size", "many"],
        "world": load,  # one process, and the checkpoint asks for three
        "heads": [
            *load,
            "--tensor-model-parallel-size",
            "1",
            "--pipeline-model-parallel-size",
            "2",
        ],
    }
    for name in ("no iteration", "no number", "hole"):
        (directory / name).mkdir()
        tracker = directory / name / "latest_checkpointed_iteration.txt"
        tracker.write_text("five" if name == "no number" else "5")
        cases[name] = ["--load", str(directory / name)]
    save_with_a_hole(directory / "hole" / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt")
    return {name: _message(parse_megatron_args, argv) for name, argv in cases.items()}


def save_with_a_hole(path: Path) -> None:
    """A legacy checkpoint's file that lost a tensor's data."""
    path.parent.mkdir(parents=True)
    whole = path.with_name("whole.pt")
    torch.save({"args": argparse.Namespace(), "iteration": 5, "model": torch.ones(9)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            if not name.endswith("data/0"):
                target.writestr(name, source.read(name))
    whole.unlink()


def _message(call, *arguments) -> str:
    """The error of one command line, as type and text; for an exit, its code and stderr."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            call(*arguments)
    except ValueError as error:
        return f"ValueError: {error}"
    except SystemExit as error:
        return f"exit {error.code}: {stderr.getvalue()}"
    return "no error"


def load_all(directory: Path) -> None:
    """Loads every case; rank 0 writes logits, tokens and arguments."""
    cases = (*LOADS, (BF16, 1))
    results = {f"{save}@{size}": run_case(directory, save, size) for save, size in cases}
    save_legacy(directory, "untied-tp3")
    for save in ("legacy", "fused"):
        results[f"{save}@3"] = run_case(directory, save, 3)
    results["errors"] = legacy_errors(directory)
    if os.environ["RANK"] == "0":
        torch.save(results, directory / "loaded.pt")


class Foreign:
    """Something that no Megatron checkpoint holds."""


def save_legacy(directory: Path, save: str) -> None:
    """Saves a checkpoint anew, at TP 3, as Megatron writes its legacy format, and variants of it.

    Every rank makes its own file of each variant.
    """
    from megatron_lowbit.integration.runtime import megatron_args, session
    from megatron_lowbit.integration.runtime.checkpoint import TRACKER
    from megatron_lowbit.integration.runtime.quiet import quiet

    args = megatron_args.parse_megatron_args(["--load", str(directory / save)])
    from megatron.training.checkpointing import get_checkpoint_name, save_checkpoint

    session.initialize(args)
    try:
        model = session.load_model(args)
        args.save, args.ckpt_format, args.use_dist_ckpt = str(directory / "legacy"), "torch", False
        with quiet():
            save_checkpoint(5, [model], None, None, 0)
        path = Path(get_checkpoint_name(str(directory / "legacy"), 5))
        for name, change in VARIANTS.items():
            copy = directory / name / path.relative_to(directory / "legacy")
            copy.parent.mkdir(parents=True)
            tracker = directory / name / TRACKER
            tracker.write_text("5")
            state = torch.load(path)
            change(state["model"])
            torch.save(state, copy)
        if args.rank == 1:
            (directory / "damaged" / path.relative_to(directory / "legacy")).write_bytes(b"PK")
            shutil.rmtree((directory / "fewer" / path.relative_to(directory / "legacy")).parent)
        torch.distributed.barrier()
    finally:
        session.shutdown()


def fuse_names(weights: dict) -> None:
    """Gives the names that Transformer Engine's fused layers write."""
    for name in list(weights):
        fused = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        fused = fused.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        weights[fused] = weights.pop(name)
    weights["decoder.layers.0.self_attention.core_attention._extra_state"] = None


# By directory: what is done to the weights of every rank.
VARIANTS = {
    "fused": fuse_names,
    "foreign": lambda weights: weights.update(note=Foreign()),
    "lacking": lambda weights: weights.pop("decoder.final_layernorm.weight"),
    "damaged": lambda weights: None,
    "fewer": lambda weights: None,
}


def legacy_errors(directory: Path) -> dict[str, str]:
    """The message that each legacy checkpoint gets that cannot be loaded."""
    cases = {"legacy": 1, "foreign": 3, "lacking": 3, "damaged": 3, "fewer": 3}
    return {save: _message(run_case, directory, save, size) for save, size in cases.items()}


def run_case(directory: Path, save: str, size: int) -> dict:
    """Logits `[batch, sequence, vocabulary]`, generations and arguments of one checkpoint."""
    from megatron_lowbit.integration.runtime import megatron_args, session, text_generation

    argv = ["--load", str(directory / save)]
    # The checkpoints made for 3 ranks are loaded without saying so.
    argv += (
        [] if (save.endswith("tp3") and size == 3) else ["--tensor-model-parallel-size", str(size)]
    )
    args = megatron_args.parse_megatron_args(argv)
    session.initialize(args)
    try:
        model, tokenizer = session.load_model(args), session.build_tokenizer(args)
        tokens = torch.load(directory / "tokens.pt")
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            logits = gather(model(tokens, positions, None))
        made = text_generation.generate(args, model, tokenizer, PROMPTS, tokens=NEW_TOKENS)
        return {
            "rank": args.rank,
            "logits": logits,
            "tokens": same_on_all_ranks([one.tokens for one in made]),
            "text": [one.text for one in made],
            "tokenized": [list(tokenizer.tokenize(text)) for text in TEXTS],
            "args": {name: value for name, value in vars(args).items() if _plain(value)},
        }
    finally:
        session.shutdown()


def gather(logits: torch.Tensor) -> torch.Tensor:
    """The whole vocabulary's logits from every tensor-parallel rank's part."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    torch.distributed.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def same_on_all_ranks(value: list) -> list:
    """Returns `value` after checking that every rank has it."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    assert all(other == value for other in values), f"ranks differ: {values}"
    return value


def _plain(value: object) -> bool:
    return value is None or type(value) in (bool, int, float, str)


if __name__ == "__main__":
    {"convert": convert_all, "load": load_all}[sys.argv[1]](Path(sys.argv[2]))
