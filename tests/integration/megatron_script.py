"""A script as Megatron-LM's own are, for test_launch.py: nothing in it knows of low bits.

Names of megatron.training are imported by value, the parser is extended, the model is built and
loaded by Megatron, its static engine generates. --act makes it do something else than that.
"""

import json
import os
import sys
import time

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
from megatron.training.arguments import parse_and_validate_args
from megatron.training.checkpointing import load_checkpoint
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


def main():
    args = parse_and_validate_args(
        extra_args_provider=add_script_args,
        args_defaults={"no_load_rng": True, "no_load_optim": True, "micro_batch_size": 1},
    )
    initialize_megatron()
    model = build()
    if args.act == "no load":
        return
    if args.act == "exit without load":
        os._exit(0)
    if args.act == "muted" or (args.act == "rank 1 muted" and args.rank == 1):
        mute(model)
    load_checkpoint(model, None, None)
    if args.act == "load again":
        load_checkpoint(model, None, None)
    if args.act == "raise":
        raise FileNotFoundError("what the script itself lacks")
    if args.act == "sleep":
        print("asleep", flush=True)
        time.sleep(60)
    if args.act is None:
        print_rank_0(f"texts {json.dumps(generate(model[0].eval()))}")
    if args.act == "early exit":
        sys.stdout.flush()
        os._exit(0)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
