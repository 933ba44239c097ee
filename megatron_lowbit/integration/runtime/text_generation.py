"""Text generation through Megatron's own static inference engine."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.rebinding import rebound
from megatron_lowbit.integration.runtime.quiet import quiet
from megatron_lowbit.integration.runtime.session import vocabulary_size


class Generation(NamedTuple):
    """What one prompt led to: the new text, and its token ids."""

    text: str
    tokens: list[int]


def generate(
    args: argparse.Namespace,
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: list[str],
    *,
    tokens: int,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
    seed: int = 1234,
) -> list[Generation]:
    """Generates from `prompts` as one batch; every rank calls it and gets the same result.

    The engine is the static one as such (`legacy=True`): by default it wraps the dynamic engine,
    whose attention needs flash-attn and CUDA.

    Args:
        args: Megatron's arguments, from `parse_megatron_args`.
        model: From `load_model`.
        tokenizer: From `build_tokenizer`.
        prompts: At least one text, each of at least one token.
        tokens: New tokens for each prompt, at most; a prompt ends early at the tokenizer's
            end-of-document and at each of the checkpoint's `eos_token_ids`.
        top_k: Sample among this many; 1 is greedy.
        top_p: Sample among the likeliest tokens of this total probability; 0 is off.
        temperature: Divides the logits before sampling.
        seed: Of the sampling.

    Returns:
        One `Generation` a prompt, in order, without the prompt.

    Raises:
        LowbitError: No prompt, an empty one, fewer than 1 token, or prompt and new tokens together
            are longer than the model's positions.
    """
    from megatron.core.inference.sampling_params import SamplingParams

    if tokens < 1:
        raise LowbitError(f"tokens to generate: {tokens}, expected at least 1")
    length = _longest(tokenizer, prompts) + tokens
    if length > args.max_position_embeddings:
        raise LowbitError(
            f"{length} tokens of prompt and output are more than the model's "
            f"{args.max_position_embeddings} positions"
        )
    sampling = SamplingParams(
        num_tokens_to_generate=tokens, top_k=top_k, top_p=top_p, temperature=temperature
    )
    stops = _stops(args, tokenizer)
    with quiet(), _no_padding_tokens(args, model, tokenizer), _engine_active():
        engine = _engine(model, tokenizer, stops, len(prompts), length, seed)
        requests = _run(engine, tokenizer, prompts, sampling)
    return [_generation(request, tokenizer, stops) for request in requests]


def _stops(args: argparse.Namespace, tokenizer: Any) -> list[int]:
    """The tokens that end a text: what the model says, and the tokenizer's end-of-document."""
    stops = [tokenizer.eod, *(getattr(args, "eos_token_ids", None) or [])]
    return [stop for stop in stops if stop is not None]


def _longest(tokenizer: Any, prompts: list[str]) -> int:
    """The longest prompt, in tokens."""
    lengths = [len(tokenizer.tokenize(prompt)) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise LowbitError("generation needs at least one prompt, and no empty one")
    return max(lengths)


def _engine(model, tokenizer, stops: list[int], batch: int, length: int, seed: int):
    """Megatron's engine: `batch` requests of at most `length` tokens, ended by any of `stops`."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    class StoppingController(TextGenerationController):
        """Ends a request at any of `stops`; Megatron's own knows one token."""

        def update_generation_status(
            self,
            updated_prompts_tokens: torch.Tensor,
            generation_started: torch.Tensor,
            current_context_end_position: int,
            is_generation_done_tensor: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """As Megatron's: which requests are done, `[batch]`, and their lengths."""
            latest = updated_prompts_tokens[:, current_context_end_position]
            stopped = torch.isin(latest, latest.new_tensor(stops)) & generation_started
            return super().update_generation_status(
                updated_prompts_tokens,
                generation_started,
                current_context_end_position,
                is_generation_done_tensor | stopped,
                *args,
                **kwargs,
            )

    context = StaticInferenceContext(batch, length)
    controller = StoppingController(GPTInferenceWrapper(model, context), tokenizer)
    return StaticInferenceEngine(
        controller,
        max_batch_size=batch,
        random_seed=seed,
        legacy=True,
    )


def _run(engine: Any, tokenizer: Any, prompts: list[str], sampling: Any) -> list[Any]:
    """The finished requests, in the order of `prompts`.

    As `engine.generate` does it, which takes off the begin-of-text that a tokenizer put before a
    prompt, and does not pass on its own `add_BOS` (0.19.2).
    """
    begins = [tokenizer.tokenize(prompt)[0] == tokenizer.bos for prompt in prompts]
    requests = [
        engine.add_request(prompt=prompt, add_BOS=begin, sampling_params=sampling)
        for prompt, begin in zip(prompts, begins, strict=True)
    ]
    engine.run_engine()
    return [engine.scheduler.completed_request_pool[request] for request in requests]


def _generation(request: Any, tokenizer: Any, stops: list[int]) -> Generation:
    """The new tokens of a finished request, without what ended it, and their text."""
    tokens = [int(token) for token in request.generated_tokens[: request.generated_length]]
    if tokens and tokens[-1] in stops:
        tokens.pop()
    return Generation(tokenizer.detokenize(tokens), tokens)


@contextlib.contextmanager
def _engine_active() -> Iterator[None]:
    """Leaves Megatron's engine flag and progress bar as they were.

    The flag is process-wide and stays set after an engine was made; a plain forward pass afterwards
    would take the engine's paths.
    """
    from megatron.core.inference.engines import static_engine
    from megatron.core.inference.utils import InferenceMode

    no_bar = functools.partial(static_engine.tqdm, disable=True)
    try:
        with rebound(static_engine, tqdm=no_bar):
            yield
    finally:
        InferenceMode.unset_active()


def _no_padding_tokens(
    args, model: torch.nn.Module, tokenizer: Any
) -> contextlib.AbstractContextManager:
    """A context that keeps the rows that pad the vocabulary from being chosen.

    Their logit is 0, which wins wherever all real logits are negative; Megatron samples over the
    padded vocabulary.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    vocabulary = vocabulary_size(args, tokenizer)

    def mask(module: torch.nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        """Sets logits past the vocabulary to -inf."""
        # The engine asks the model to gather them: every rank has the whole padded vocabulary.
        assert logits.shape[-1] == args.padded_vocab_size, logits.shape
        logits[..., vocabulary:] = float("-inf")
        return logits

    if parallel_state.is_pipeline_last_stage() and args.padded_vocab_size > vocabulary:
        return unwrap_model(model).register_forward_hook(mask)
    return contextlib.nullcontext()
