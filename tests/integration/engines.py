"""Megatron's inference engines around a small model, in the words of each release."""

import contextlib
import inspect
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from small_gpt import HIDDEN, LAYERS, VOCAB, gpt_model, layer_spec

from megatron_lowbit.integration.sums import reducer

BLOCK, LONGEST, NEW_TOKENS = 8, 112, 12
# The third shares three blocks with the second, and ends elsewhere; all together, and the fourth
# alone, are more than the 64 tokens of a step.
SHARED = [(7 * i) % 118 for i in range(3 * BLOCK)]
LONG = [(11 * i + 5) % 118 for i in range(80)]
PROMPTS = [[3, 5, 7], [*SHARED, 11, 12, 13, 14], [*SHARED, 40, 41], LONG, [100, 2, 9, 4, 7]]
END = VOCAB - 1
SUMS = 2 * LAYERS  # of a forward pass
ALONE = 2
DYNAMIC_INSIDE = "dynamic engine inside the static one"
# What engines can do beside batching, and the minor release that has it first.
SINCE = {
    # Before, the last tokens' logits were taken of a rank's share of the tokens.
    "sequence parallelism": 14,
    "chunked prefill": 15,
    DYNAMIC_INSIDE: 16,
    "prefix caching": 17,
    "speculative decoding": 17,
    "MegatronLLM": 19,
}
REQUESTS = 8  # the ranks must divide it
SIZES = {"max_sequence_length": LONGEST, "buffer_size_gb": 0.02, "max_requests": REQUESTS}


class Tokenizer:
    """Texts are numbers already."""

    eod = END
    bos = None
    vocab_size = VOCAB

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, tokens: list[int], **_) -> str:
        return " ".join(map(str, tokens))

    def offsets(self, tokens: list[int], text: str) -> list[int]:
        return list(range(len(tokens)))


def accepted(function, options: dict) -> dict:
    """Those of `options` that a release's function takes."""
    taken = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in taken}


def has_new_config() -> bool:
    """Whether this release has `InferenceConfig` (0.17) instead of `InferenceWrapperConfig`."""
    try:
        import megatron.core.inference.config  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def controller_of(model, context):
    """Megatron's controller around a model."""
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    if has_new_config():
        wrapper = GPTInferenceWrapper(model, context)
    else:
        from megatron.core.inference.model_inference_wrappers import inference_wrapper_config

        config = inference_wrapper_config.InferenceWrapperConfig(
            hidden_size=model.config.hidden_size,
            params_dtype=model.config.params_dtype,
            inference_batch_times_seqlen_threshold=-1,
            padded_vocab_size=VOCAB,
            inference_max_requests=REQUESTS,
            inference_max_seq_length=LONGEST,
        )
        wrapper = GPTInferenceWrapper(model, config, context)
    wrapper.model_is_pipeline_parallel = False  # before 0.15 set by the caller of the static engine
    return TextGenerationController(wrapper, Tokenizer())


def static_engine(model, *, legacy: bool = True):
    """The static engine; with legacy=False it has a dynamic one inside, if it could be made."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines import StaticInferenceEngine

    context = StaticInferenceContext(REQUESTS, LONGEST)
    options = accepted(StaticInferenceEngine, {"legacy": legacy, "buffer_size_gb": 0.01})
    return StaticInferenceEngine(
        controller_of(model, context), max_batch_size=REQUESTS, random_seed=1, **options
    )


def inference_config(**options):
    """Newer releases' config of an engine with pages of `BLOCK` tokens."""
    from megatron.core.inference.config import InferenceConfig

    options = accepted(InferenceConfig, {"max_tokens": 128, **options})
    return InferenceConfig(**SIZES, block_size_tokens=BLOCK, **options)


def older_context(model, *, max_tokens: int = 128, **options):
    """The same in older releases' words."""
    from megatron.core.inference.contexts import DynamicInferenceContext

    named = {
        **SIZES,
        "params_dtype": model.config.params_dtype,
        "num_layers": model.config.num_layers,
        "kv_channels": model.config.kv_channels,
        "num_attention_heads": model.config.num_query_groups,
        "max_tokens": max_tokens,
        "max_requests_override": REQUESTS,
        "max_tokens_override": max_tokens,
        "block_size_tokens": BLOCK,
        "chunk_size_tokens": BLOCK,
        "buffer_guaranteed_fraction": 0.5,
        "tensor_model_parallel_size": dist.get_world_size(),
        **options,
    }
    return DynamicInferenceContext(**accepted(DynamicInferenceContext, named))


def dynamic_engine(model, *, chunked: bool = False, **options):
    """The dynamic engine; options are those of its config, where this release has them."""
    from megatron.core.inference.contexts import DynamicInferenceContext
    from megatron.core.inference.engines import DynamicInferenceEngine

    if has_new_config():
        config = inference_config(enable_chunked_prefill=chunked, **options)
        context = DynamicInferenceContext(model.config, config)
        return DynamicInferenceEngine(controller_of(model, context), context)
    context = older_context(model, **options)
    settings = {"termination_id": END, "random_seed": 1, "enable_chunked_prefill": chunked}
    settings["enable_cuda_graph"] = is_graphed(model)
    settings = accepted(DynamicInferenceEngine.__init__, settings)
    return DynamicInferenceEngine(controller_of(model, context), context, **settings)


def is_graphed(model) -> bool:
    """Whether Megatron is to capture the model's layers, in the words of this release."""
    impl = getattr(model.config, "cuda_graph_impl", None)
    return impl == "local" or (impl is None and model.config.enable_cuda_graph)


def high_level_api(model):
    """Newer releases' MegatronLLM around a dynamic engine in this process."""
    from megatron.core.inference.apis import MegatronLLM

    config = inference_config()
    return MegatronLLM(
        model=model, tokenizer=Tokenizer(), inference_config=config, use_coordinator=False
    )


def greedy(engine, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    """New tokens of each prompt."""
    from megatron.core.inference.sampling_params import SamplingParams

    sampling = SamplingParams(num_tokens_to_generate=NEW_TOKENS, top_k=1)
    if hasattr(sampling, "termination_id"):
        sampling.termination_id = END
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    done = engine.generate(prompts=texts, sampling_params=sampling)
    done = [request.merge() if hasattr(request, "merge") else request for request in done]
    done.sort(key=lambda request: int(request.request_id))  # older releases: as they finished
    return [[int(token) for token in request.generated_tokens] for request in done]


def alone(engine) -> list[list[int]]:
    """New tokens of the first prompts, one after the other."""
    return [greedy(engine, [prompt])[0] for prompt in PROMPTS[:ALONE]]


@contextlib.contextmanager
def counted(model) -> Iterator[list]:
    """What goes through the model: (tokens, collective) of each sum, or "forward" of each pass."""
    original, seen = reducer.all_reduce, []

    def recording(partial, **call):
        chosen = call["collective"].all_reduce(partial.numel()).collective
        seen.append((partial.numel() // partial.shape[-1], chosen))
        return original(partial, **call)

    hook = model.register_forward_pre_hook(lambda *_: seen.append("forward"))
    with hook, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reducer, "all_reduce", recording)
        yield seen


def assert_carried(handle) -> None:
    """Each sync point's error came to the next one."""
    carried = handle.feedback()
    assert (carried["sync_points"], carried["dropped"]) == (SUMS, 0)
    assert carried["bytes"] > 0


def needs(feature: str) -> None:
    import megatron.core

    if int(megatron.core.__version__.split(".")[1]) < SINCE[feature]:
        pytest.skip(f"this release has no {feature}")


def with_prediction_head(config):
    """A model with a head that guesses the token after the next one, some of them right.

    Decoder and head both go by little more than the last token's embedding: the head takes nothing
    else of its inputs, and all layers add a tenth of what they would.
    """
    from megatron.core.transformer import multi_token_prediction

    # After 0.19 it compares with classes that are none where Transformer Engine is missing.
    if hasattr(multi_token_prediction, "is_inference_column_parallel_linear"):
        multi_token_prediction.is_inference_column_parallel_linear = lambda module: False
    config.mtp_num_layers = 1
    model = gpt_model(config, layer_spec({}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear_proj" in name or "linear_fc2" in name:
                parameter *= 0.1
            if "eh_proj" in name:
                mine = torch.eye(HIDDEN, 2 * HIDDEN).chunk(dist.get_world_size())
                parameter.copy_(mine[dist.get_rank()])
    return model.eval()
