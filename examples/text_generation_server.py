#!/usr/bin/env python3
"""Megatron-core's older text-generation server, over the static engine, by a plain Megatron script.

Nothing in it knows of low bits: run it through the launcher.

  torchrun --nproc-per-node 3 -m megatron_lowbit.launch examples/text_generation_server.py \\
      --load CKPT --use-checkpoint-args --tensor-model-parallel-size 3 --lowbit-tp-comm

ENGINE=static examples/serve.sh does, and asks it. It serves as Megatron-LM's
tools/run_text_generation_server.py, which no package carries: PUT /api with {"prompts": [...],
"tokens_to_generate": N}, and POST /completions. A request that it could not serve is answered with
status 400 (request_checks.py): Megatron checks little, and one bad request would end the server.
"""

import argparse
import functools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from megatron.core.inference.text_generation_server import MegatronServer
from megatron.core.inference.text_generation_server.endpoints.common import GENERATE_NUM
from megatron.core.inference.text_generation_server.run_mcore_engine import run_mcore_engine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from request_checks import Checks
from serving import initialize, load_model

REQUESTS = 8  # prompts in one batch, at most


def make_engine(model: torch.nn.Module, args: argparse.Namespace) -> StaticInferenceEngine:
    """Megatron's static engine as such: this server cannot answer from the dynamic one (0.19.2)."""
    context = StaticInferenceContext(REQUESTS, args.max_position_embeddings)
    wrapped = GPTInferenceWrapper(model, context)
    tokenizer = build_tokenizer(args)
    if not hasattr(tokenizer._tokenizer, "offsets"):  # Hugging Face's, in 0.19.2
        tokenizer._tokenizer.offsets = functools.partial(offsets, tokenizer)
    controller = TextGenerationController(wrapped, tokenizer)
    return StaticInferenceEngine(controller, max_batch_size=REQUESTS, legacy=True)


def offsets(tokenizer: Any, ids: list[int], text: str) -> list[int]:
    """Where in `text` each token begins: the server's answers have a text's segments."""
    return [len(tokenizer.detokenize(ids[:count])) for count in range(len(ids))]


@torch.inference_mode()
def follow(engine: StaticInferenceEngine) -> None:
    """Generate whatever the first rank's server was asked for."""
    device = torch.cuda.current_device()
    while True:
        choice = torch.empty(1, dtype=torch.long, device=device)
        torch.distributed.broadcast(choice, 0)
        if choice.item() == GENERATE_NUM:
            run_mcore_engine(engine)


def main() -> None:
    """Load, then serve on the first rank; the others follow."""
    args = initialize()
    engine = make_engine(load_model(args), args)
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        server = MegatronServer(engine, args)
        checks = Checks(
            build_tokenizer(args),
            positions=args.max_position_embeddings,
            vocabulary=args.padded_vocab_size,
        )
        checks.install(server.app)
        server.run(args.host, port=args.port)
    else:
        follow(engine)


if __name__ == "__main__":
    main()
