"""Models from Hugging Face or GGUF files to Megatron-core checkpoints.

One process, no GPU and no torchrun: the weights go into a model on the CPU, which writes itself as
a torch_dist checkpoint, the format that any tensor-parallel size can load. The checkpoint holds
Megatron's arguments for the architecture and the tokenizer, so that `--load DIR` is all a tool
needs. Only megatron.core and transformers are used.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_lowbit import cli
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import atomic_directory
from megatron_lowbit.integration.convert.families import Architecture
from megatron_lowbit.integration.convert.hf_source import load_tokenizer, read_config
from megatron_lowbit.integration.convert.translate import (
    DTYPES,
    layer_weights,
    megatron_args,
    outer_weights,
)
from megatron_lowbit.integration.convert.weights import Weights, open_weights
from megatron_lowbit.integration.cpu.device import enable_cpu
from megatron_lowbit.integration.runtime.checkpoint import TRACKER
from megatron_lowbit.integration.runtime.hybrid import local_final_norm, local_stack_spec
from megatron_lowbit.integration.runtime.quiet import quiet

# What a converted checkpoint's directory holds, with what calibration adds.
_OURS = {TRACKER, "release", "tokenizer", "lowbit", ".lowbit.partial"}


def convert(
    model: str | os.PathLike,
    *,
    save: str | os.PathLike,
    tensor_parallel: int = 1,
    dtype: str = "bf16",
    hybrid: bool = False,
    progress: bool = False,
) -> argparse.Namespace:
    """Converts a Hugging Face directory or a GGUF file into a Megatron-core checkpoint.

    The caller's main module needs an `if __name__ == "__main__"` guard: writing starts a process.

    Args:
        model: A directory with config.json, safetensors and a tokenizer; or a `.gguf` file.
        save: The checkpoint's directory. A checkpoint that is already there is replaced, in one
            step and only once the new one is complete.
        tensor_parallel: The tensor-parallel size that is recorded, and that the vocabulary is
            padded for. Other sizes can load the checkpoint too.
        dtype: Of the stored weights: "bf16", "fp16" or "fp32".
        hybrid: For Megatron's HybridModel instead of its GPTModel: the same model, the same logits.
        progress: Shows a progress bar on stderr.

    Returns:
        The Megatron arguments that the checkpoint holds.

    Raises:
        LowbitError: The model is missing, damaged or not supported, its parts disagree, `dtype`
            cannot hold it, the size does not divide, `save` is something else, or
            torch.distributed is already in use.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LowbitError("conversion runs in one process: do not start it with torchrun")
    source, target = Path(model), Path(save).absolute()
    arch = read_config(source)
    arch.check_tensor_parallel(tensor_parallel)
    if dtype not in DTYPES:
        raise LowbitError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    args = megatron_args(
        arch, ranks=tensor_parallel, dtype=dtype, tokenizer=target / "tokenizer", hybrid=hybrid
    )
    tokenizer = load_tokenizer(source, arch.vocab)
    with (
        open_weights(source, arch, DTYPES[dtype]) as get,
        replacing_checkpoint(target) as directory,
    ):
        tokenizer.save_pretrained(directory / "tokenizer")
        _write(arch, args, get, directory=directory, progress=progress)
    return args


def replacing_checkpoint(target: Path) -> contextlib.AbstractContextManager[Path]:
    """Gives a temporary directory that becomes `target` when the block ends well.

    Raises:
        LowbitError: What is at `target` is not a converted checkpoint: not ours to replace.
    """
    foreign = {path.name for path in target.iterdir()} - _OURS if target.is_dir() else set()
    if foreign:
        raise LowbitError(f"--save {target}: has {min(foreign)}, which no conversion wrote")
    return atomic_directory(target)


def _write(arch, args, get: Weights, *, directory: Path, progress: bool) -> None:
    """Fills a Megatron model with the weights and saves it as the checkpoint in `directory`."""
    enable_cpu()
    release = directory / "release"
    release.mkdir()
    with quiet(), single_process_group():
        from megatron.core import dist_checkpointing
        from torch.distributed.checkpoint import CheckpointException

        model = _build(arch, args)
        _fill(model, arch, get, hybrid="hybrid_layer_pattern" in args, progress=progress)
        common = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
        _check_space(model, directory)
        try:
            dist_checkpointing.save({**common, "model": model.sharded_state_dict()}, str(release))
        except (CheckpointException, RuntimeError) as error:
            # Megatron writes in a process of its own, whose reason (a full disk) it does not pass.
            raise LowbitError(f"{directory.parent}: writing the checkpoint failed") from error
        # Where releases before 0.19 have what is not sharded, and newer ones look first.
        torch.save(common, release / "common.pt")
    (directory / TRACKER).write_text("release")


def _check_space(model: torch.nn.Module, directory: Path) -> None:
    """Raises LowbitError where the weights do not fit on the disk."""
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise LowbitError(
            f"{directory.parent}: {free / 1e9:.1f} GB free, the checkpoint needs {needed / 1e9:.1f}"
        )


@contextlib.contextmanager
def single_process_group() -> Iterator[None]:
    """Megatron's model parallelism of size 1 in a process group of one process."""
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        parallel_state.initialize_model_parallel(1)
        tensor_parallel.model_parallel_cuda_manual_seed(1, inference_rng_tracker=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _build(arch: Architecture, args: argparse.Namespace) -> torch.nn.Module:
    """An empty model on the CPU, with the parameters that `arch` has; it is never run.

    Its local layers store the same keys as Transformer Engine's: Megatron maps the norms.
    """
    from megatron.core.transformer import TransformerConfig

    pattern = getattr(args, "hybrid_layer_pattern", None)
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.ffn,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_epsilon,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=arch.family.qkv_bias,
        qk_layernorm=arch.family.qk_norm,
        params_dtype=args.params_dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        **({"is_hybrid_model": True} if pattern else {}),
    )
    return _model_of(
        config,
        pattern,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=arch.max_positions,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        share_embeddings_and_output_weights=arch.tied,
    ).to(args.params_dtype)


def _model_of(config, pattern: str | None, **outside) -> torch.nn.Module:
    """A GPTModel, or with a pattern of layers a HybridModel."""
    if pattern:
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        with local_final_norm():
            stack = local_stack_spec(config, pattern)
            return HybridModel(config, stack, hybrid_layer_pattern=pattern, **outside)
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    kind = {"normalization": config.normalization, "qk_layernorm": config.qk_layernorm}
    spec = get_gpt_layer_local_spec(**kind)
    return GPTModel(config=config, transformer_layer_spec=spec, **outside)


@torch.no_grad()
def _fill(
    model: torch.nn.Module, arch: Architecture, get: Weights, *, hybrid: bool, progress: bool
) -> None:
    """Copies every weight into `model`; rows of the padded vocabulary become zero."""
    parameters = dict(model.named_parameters())
    layers = range(arch.layers)

    def put(weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            parameter = parameters.pop(name)
            assert weight.shape[1:] == parameter.shape[1:], name  # checked against the config
            parameter.zero_()
            parameter[: weight.shape[0]].copy_(weight)

    put(outer_weights(get, arch, hybrid=hybrid))
    for layer in cli.progress("layers", "layer")(layers) if progress else layers:
        put(layer_weights(get, arch, layer, hybrid=hybrid))
    assert not parameters, f"parameters that no weight went into: {sorted(parameters)}"
