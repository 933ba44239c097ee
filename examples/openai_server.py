#!/usr/bin/env python3
"""Megatron-core's OpenAI-compatible endpoint over its dynamic engine, by a plain Megatron script.

Nothing in it knows of low bits: run it through the launcher.

  torchrun --nproc-per-node 3 -m megatron_lowbit.launch examples/openai_server.py \\
      --load CKPT --use-checkpoint-args --tensor-model-parallel-size 3 --lowbit-tp-comm

examples/serve.sh does, and asks it. POST /v1/completions and /v1/chat/completions, GET /v1/health.
A request that it could not serve, or that asks for what the endpoint would ignore, is answered with
status 400 (openai_checks.py): an assertion of the engine ends the server for all.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import socket
from typing import Any

import torch
from openai_checks import install
from serving import initialize, load_model

# The coordinator's process reads this file again, without the launcher: no Megatron up here.


REQUESTS = 64  # for each rank, whose number must divide them: at once, more wait


def make_config(args: argparse.Namespace) -> Any:
    """The dynamic engine's, by Megatron's own flags."""
    from megatron.core.inference.config import InferenceConfig

    requests = REQUESTS * args.tensor_model_parallel_size
    return InferenceConfig(
        max_sequence_length=args.max_position_embeddings,
        block_size_tokens=args.inference_dynamic_batching_block_size,
        buffer_size_gb=args.inference_dynamic_batching_buffer_size_gb,
        max_requests=args.inference_dynamic_batching_max_requests or requests,
        max_tokens=args.inference_dynamic_batching_max_tokens,
        enable_prefix_caching=args.inference_dynamic_batching_enable_prefix_caching,
        materialize_only_last_token_logits=False,  # log-probabilities of prompts need all
    )


def own_address() -> str:
    """Where the engine's own sockets listen; --host opens the endpoint alone.

    Whoever reaches them steers the engine: so the loopback, where all ranks are on one machine.
    Otherwise the address on the way to rank 0: the host name is often that of a loopback.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        return probe.getsockname()[0]


async def serve(model: torch.nn.Module, tokenizer: Any, args: argparse.Namespace) -> None:
    """Start the engine on every rank and the endpoint on the first; ends with the engine."""
    from megatron.core.inference.apis import MegatronAsyncLLM, ServeConfig

    llm = MegatronAsyncLLM(
        model=model,
        tokenizer=tokenizer,
        inference_config=make_config(args),
        coordinator_host=own_address(),
    )
    if llm.is_primary_rank:
        install(
            tokenizer,
            positions=args.max_position_embeddings,
            vocabulary=args.padded_vocab_size,
        )
    # One process: each has a client of the coordinator's, and would answer no faster.
    await llm.serve(ServeConfig(host=args.host, port=args.port, frontend_replicas=1))


def end_children() -> None:
    """The endpoint's and the coordinator's process: nobody else ends them after a signal."""
    for child in multiprocessing.active_children():
        child.terminate()
    for child in multiprocessing.active_children():
        child.join(timeout=5)
        with contextlib.suppress(ValueError):  # closed meanwhile
            child.kill()


def main() -> None:
    """Load, then serve until a signal."""
    # The endpoint's process is a copy of this one: so it has the checks, too.
    multiprocessing.set_start_method("fork")
    args = initialize()
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    model = load_model(args)
    try:
        asyncio.run(serve(model, build_tokenizer(args), args))
    finally:
        end_children()


if __name__ == "__main__":
    main()
