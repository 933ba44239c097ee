"""A script as Megatron-LM's own are, for test_launch.py: nothing in it knows of low bits.

Names of megatron.training are imported by value, the parser is extended, the model is built and
loaded by Megatron, its static engine generates. --act makes it do something else than that. With
--own "ARGS..." as its first words it builds its argument list itself, as evaluation harnesses do.
"""

import argparse
import errno
import json
import os
import shlex
import sys
import time
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, print_rank_0
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import (
    add_megatron_arguments,
    parse_and_validate_args,
    validate_args,
)
from megatron.training.checkpointing import load_args_from_checkpoint, load_checkpoint
from megatron.training.global_vars import set_global_variables
from megatron.training.initialize import initialize_megatron
from megatron.training.models import GPTModelBuilder

TOKENS = 5


def add_script_args(parser):
    group = parser.add_argument_group(title="script")
    group.add_argument("--prompts", nargs="+", default=["the world", "a model of"])
    group.add_argument("--act", help="something else than to generate, 100% on purpose")
    return parser


def build():
    args = get_args()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    builder = GPTModelBuilder(gpt_config_from_args(args))
    return builder.build_distributed_models(pg_collection=groups, wrap_with_ddp=False)


def mute(model):
    for name, module in model[0].named_modules():
        if name.endswith(("linear_proj", "linear_fc2")):
            module.explicit_expert_comm = True


def generate(model):
    args = get_args()
    prompts, tokenizer = args.prompts, build_tokenizer(args)
    context = StaticInferenceContext(len(prompts), 64)
    controller = TextGenerationController(GPTInferenceWrapper(model, context), tokenizer)
    engine = StaticInferenceEngine(controller, max_batch_size=len(prompts), legacy=True)
    sampling = SamplingParams(num_tokens_to_generate=TOKENS, top_k=1)
    requests = engine.generate(prompts=prompts, sampling_params=sampling)
    return [tokenizer.detokenize(request.generated_tokens.tolist()) for request in requests]


DEFAULTS = {"no_load_rng": True, "no_load_optim": True, "micro_batch_size": 1}


def parse():
    """By Megatron's own function, or as scripts do that hand a list of their own on."""
    if sys.argv[1] == "--own":
        sys.argv = [sys.argv[0], *shlex.split(sys.argv[2])]
    elif sys.argv[1] == "--own-parser":
        parser = add_script_args(add_megatron_arguments(argparse.ArgumentParser()))
        args, _ = parser.parse_known_args(shlex.split(sys.argv[2]))
        args.rank, args.world_size = 0, 1
        load_args_from_checkpoint(args)
        validate_args(args, DEFAULTS)
        set_global_variables(args, build_tokenizer=False)
        return args
    return parse_and_validate_args(extra_args_provider=add_script_args, args_defaults=DEFAULTS)


def change_arguments(act):
    """What --yaml-cfg does to Megatron's arguments: others take their place."""
    args = get_args()
    if act == "replace":
        args.lowbit_tp_comm = None
    if act == "set late":
        for name in [name for name in vars(args) if name.startswith("lowbit_")]:
            delattr(args, name)
        args.lowbit_tp_comm, args.lowbit_collective, args.lowbit_bits = True, "one-shot", 6
    if act == "set wrong":
        args.lowbit_bits = [4, 6]


def load_otherwise(act, model):
    """Ways to get along without `load_checkpoint` as it is."""
    if act == "swallow":
        mute(model)
        try:
            load_checkpoint(model, None, None)
        except ValueError:
            print("swallowed")
    if act == "other loader":
        print_rank_0(f"texts {json.dumps(generate(model[0].eval()))}")


def after_loading(act, model):
    from megatron_lowbit.integration import hooks

    if act == "load again":
        load_checkpoint(model, None, None)
    if act == "other weights":
        for name, parameter in model[0].named_parameters():
            if "norm" in name:
                parameter.data += 1
        hooks.checkpoint_loaded(model)
    if act == "second model":
        second = build()
        load_checkpoint(second, None, None)
        print_rank_0(f"texts {json.dumps([generate(m[0].eval()) for m in (model, second)])}")
    if act == "second model, not loaded":
        print_rank_0(f"texts {json.dumps([generate(m[0].eval()) for m in (model, build())])}")
    if act == "remove and load":
        hooks._on[0].handle.remove()
        load_checkpoint(model, None, None)
    if act.startswith("full disk"):

        def full(path, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        Path.write_bytes = full
        if act.endswith("sys.exit"):
            sys.exit(0)
        if act.endswith("os._exit"):
            os._exit(0)


def main():
    args = parse()
    initialize_megatron()
    torch.ones(1, device=torch.device(f"cuda:{torch.cuda.current_device()}"))
    change_arguments(args.act)
    model = build()
    if args.act in ("no load", "swallow", "other loader"):
        load_otherwise(args.act, model)
        return
    if args.act == "exit without load":
        os._exit(0)
    if args.act == "muted" or (args.act == "rank 1 muted" and args.rank == 1):
        mute(model)
    load_checkpoint(model, None, None)
    after_loading(args.act or "", model)
    if args.act == "raise":
        raise FileNotFoundError("what the script itself lacks")
    if args.act == "sleep":
        os.chdir("/")
        print("asleep", flush=True)
        time.sleep(60)
    if args.act is None:
        print_rank_0(f"texts {json.dumps(generate(model[0].eval()))}")
    if args.act == "early exit":
        os.chdir("/")
        sys.stdout.flush()
        os._exit(0)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
