"""Megatron's inference engines with low-bit sums; run by test_engines.py in forked ranks.

One process group does all the work on one release and rank by rank writes what it saw to
OUT/rankN.pt; the assertions are in test_engines.py.
"""

import argparse
import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from small_gpt import HIDDEN, VOCAB, build, make_index, message

import megatron_lowbit
from megatron_lowbit.comm.policy.policy import Settings
from megatron_lowbit.comm.policy.timings import Case, Timings
from megatron_lowbit.comm.policy.tuning import Tuning, this_machine, write_tuning
from megatron_lowbit.integration.cpu.attention import enable_cpu_engines

BLOCK, LONGEST, NEW_TOKENS = 8, 112, 12
# The third shares three blocks with the second, and ends elsewhere; all together, and the fourth
# alone, are more than the 64 tokens of a step.
SHARED = [(7 * i) % 118 for i in range(3 * BLOCK)]
LONG = [(11 * i + 5) % 118 for i in range(80)]
PROMPTS = [[3, 5, 7], [*SHARED, 11, 12, 13, 14], [*SHARED, 40, 41], LONG, [100, 2, 9, 4, 7]]
END = VOCAB - 1
DYNAMIC_INSIDE = "dynamic engine inside the static one"
ALONE = 2
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


def inference_config(*, max_tokens: int, **options):
    """Newer releases' config of an engine with pages of `BLOCK` tokens."""
    from megatron.core.inference.config import InferenceConfig

    return InferenceConfig(**SIZES, max_tokens=max_tokens, block_size_tokens=BLOCK, **options)


def dynamic_context(model, *, max_tokens: int = 128, **options):
    """A context with pages of `BLOCK` tokens, in the words of this release."""
    from megatron.core.inference.contexts import DynamicInferenceContext

    if has_new_config():
        config = inference_config(max_tokens=max_tokens, **options)
        return DynamicInferenceContext(model.config, config)
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
    }
    return DynamicInferenceContext(**accepted(DynamicInferenceContext, named), **options)


def dynamic_engine(model, *, chunked: bool = False, **options):
    """The dynamic engine; options are those of newer releases' `InferenceConfig`."""
    from megatron.core.inference.engines import DynamicInferenceEngine

    if has_new_config():
        context = dynamic_context(model, enable_chunked_prefill=chunked, **options)
        return DynamicInferenceEngine(controller_of(model, context), context)
    context = dynamic_context(model, **options)
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

    config = inference_config(max_tokens=128)
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


def leave_engine_mode() -> None:
    """Engines set a flag of the process that changes plain forward passes."""
    with contextlib.suppress(ImportError):
        from megatron.core.inference.utils import InferenceMode

        InferenceMode.unset_active()


@contextlib.contextmanager
def counted(model) -> Iterator[list]:
    """What goes through the model: (tokens, collective) of each sum, or "forward" of each pass."""
    module = importlib.import_module("megatron_lowbit.integration.sums.reducer")
    original, seen = module.all_reduce, []

    def recording(partial, **call):
        chosen = call["collective"].all_reduce(partial.numel()).collective
        seen.append((partial.numel() // partial.shape[-1], chosen))
        return original(partial, **call)

    hook = model.register_forward_pre_hook(lambda *_: seen.append("forward"))
    module.all_reduce = recording
    try:
        yield seen
    finally:
        module.all_reduce = original
        hook.remove()


def features() -> list[str]:
    """What this release's engines can do beside batching."""
    from megatron.core.inference import contexts, engines
    from megatron.core.models.gpt.gpt_model import GPTModel

    context = inspect.signature(contexts.DynamicInferenceContext).parameters
    if has_new_config():
        from megatron.core.inference.config import InferenceConfig

        context = inspect.signature(InferenceConfig).parameters
    dynamic = inspect.signature(engines.DynamicInferenceEngine.__init__).parameters
    found = {
        # Before, the last tokens' logits were taken of a rank's share of the tokens.
        "sequence parallelism": "sequence_parallel_override" in inspect.getsource(GPTModel),
        "chunked prefill": "enable_chunked_prefill" in {*context, *dynamic},
        DYNAMIC_INSIDE: "legacy" in inspect.signature(engines.StaticInferenceEngine).parameters,
        "prefix caching": "enable_prefix_caching" in context,
        "speculative decoding": "num_speculative_tokens" in context,
        "MegatronLLM": importlib.util.find_spec("megatron.core.inference.apis") is not None,
    }
    return [name for name, is_there in found.items() if is_there]


def plain(model) -> dict:
    """Greedy tokens of both engines."""
    return {"static": greedy(static_engine(model)), "dynamic": greedy(dynamic_engine(model))}


def engines(model) -> dict:
    """Greedy tokens of the engines, batched, alone and in other ways."""
    result = plain(model)
    if DYNAMIC_INSIDE in features():
        inner = static_engine(model, legacy=False)
        result["has_dynamic_inside"] = hasattr(inner, "dynamic_engine")
        result["static, dynamic inside"] = greedy(inner)
    result["static alone"] = alone(static_engine(model))
    result["dynamic alone"] = alone(dynamic_engine(model))
    if "chunked prefill" in features():
        with counted(model) as seen:
            result["chunked"] = greedy(dynamic_engine(model, chunked=True, max_tokens=64))
        result["chunked sums"] = [s for s in seen if s != "forward"]
    if "prefix caching" in features():
        engine = dynamic_engine(model, enable_prefix_caching=True)
        result["prefix"] = greedy(engine)
        result["prefix skipped"] = engine._prefill_tokens_skipped
    if "MegatronLLM" in features():
        result["MegatronLLM"] = greedy(high_level_api(model))
    return result


def in_bf16(model) -> dict:
    """The dynamic engine only: the static one rounds its attention in other places."""
    result = {"dynamic": greedy(dynamic_engine(model)), "alone": alone(dynamic_engine(model))}
    if "chunked prefill" in features():
        result["chunked"] = greedy(dynamic_engine(model, chunked=True, max_tokens=64))
    return result


def low_bits(model, index, run) -> dict:
    """What `run` gives with a fixed collective, and what was counted."""
    handle = megatron_lowbit.apply(model, index, collective="one-shot")
    with counted(model) as seen:
        result = run(model)
    result["forwards"] = seen.count("forward")
    result["stats"], result["feedback"] = handle.stats(), handle.feedback()
    handle.remove()
    return result


def tuned(model, index, out: Path) -> dict:
    """`auto` by a tuning file in which large messages go low-bit and small ones native."""
    handle = megatron_lowbit.apply(model, index, collective="one-shot")
    kinds = handle.kinds
    handle.remove()
    milliseconds = {Case("", False, "native"): (0.1, 10.0)}
    milliseconds |= {kind.case("one-shot"): (1.0, 1.0) for kind in kinds}
    milliseconds |= {kind.case("two-shot"): (2.0, 2.0) for kind in kinds}
    times = Timings(
        {
            case: {1024: (short,) * 6, 2048: (long,) * 6}  # 10 and 21 tokens
            for case, (short, long) in milliseconds.items()
        }
    )
    path, ranks = out / "tuning.json", dist.get_world_size()
    if dist.get_rank() == 0:
        write_tuning(Tuning(this_machine(), ranks, None, "as it is", times), path)
    dist.barrier()
    handle = megatron_lowbit.apply(model, index, collective=Settings(tuning=path))
    with counted(model) as seen:
        tokens = greedy(
            dynamic_engine(model, max_tokens=64, chunked="chunked prefill" in features())
        )
    stats = handle.stats()
    handle.remove()
    return {"tokens": tokens, "seen": seen, "stats": stats}


def with_prediction_head():
    """A model with a head that guesses the token after the next one, some of them right.

    Decoder and head both go by little more than the last token's embedding: the head takes nothing
    else of its inputs, and all layers add a tenth of what they would.
    """
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import multi_token_prediction

    # After 0.19 it compares with classes that are none where Transformer Engine is missing.
    if hasattr(multi_token_prediction, "is_inference_column_parallel_linear"):
        multi_token_prediction.is_inference_column_parallel_linear = lambda module: False
    config = build(torch.float32).config
    config.mtp_num_layers = 1
    spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    head = gpt_layer_specs.get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=LONGEST,
        position_embedding_type="rope",
        mtp_block_spec=head,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear_proj" in name or "linear_fc2" in name:
                parameter *= 0.1
            if "eh_proj" in name:
                mine = torch.eye(HIDDEN, 2 * HIDDEN).chunk(dist.get_world_size())
                parameter.copy_(mine[dist.get_rank()])
    return model.eval()


def speculative(out: Path) -> dict:
    """Greedy tokens without and with guesses, natively and in low bits."""
    if "speculative decoding" not in features():
        return {}
    leave_engine_mode()
    model = with_prediction_head()
    index, _ = make_index(model, out)
    result = {"native": greedy(dynamic_engine(model))}
    handle = megatron_lowbit.apply(model, index, collective="one-shot")
    result["heads"] = [name for name in handle.native if "mtp" in name]
    result["plain"] = greedy(dynamic_engine(model))
    with counted(model) as seen:
        engine = dynamic_engine(model, num_speculative_tokens=1)
        result["guessing"] = greedy(engine)
    result["forwards"] = seen.count("forward")
    result["accepted"] = int(engine._spec_tokens_accepted_per_pos.sum())
    result["proposed"] = int(engine._spec_tokens_proposed_per_pos.sum())
    result["alone"] = alone(dynamic_engine(model, num_speculative_tokens=1))
    result["feedback"] = handle.feedback()
    handle.remove()
    return result


def sequence_parallel(index) -> dict:
    """The model with sequence parallelism: the same weights, so the same index serves."""
    if "sequence parallelism" not in features():
        return {}
    leave_engine_mode()
    model = build(torch.float32, sequence_parallel=True)
    result = {"native": greedy(dynamic_engine(model))}
    for gather in (None, 6):
        handle = megatron_lowbit.apply(model, index, collective="one-shot", all_gather_bits=gather)
        result[gather] = greedy(dynamic_engine(model))
        result[gather, "alone"] = alone(dynamic_engine(model))
        result[gather, "stats"], result["feedback"] = handle.stats(), handle.feedback()
        handle.remove()
    return result


def refused_graphs(model, index, message) -> dict[str, str]:
    """What is said of settings of Megatron's graphs; the model says that it is to have some."""
    layer, found = model.decoder.layers[0], {}
    name = "cuda_graph_impl" if hasattr(layer.config, "cuda_graph_impl") else "enable_cuda_graph"
    before, steps = getattr(layer.config, name), layer.config.cuda_graph_warmup_steps
    setattr(layer.config, name, "local" if name == "cuda_graph_impl" else True)
    found["graphed"] = message(lambda: megatron_lowbit.apply(model, index).remove())
    layer.train()
    found["gathers"] = message(lambda: megatron_lowbit.apply(model, index, all_gather_bits=6))
    layer.eval()
    layer.config.cuda_graph_warmup_steps = 0
    found["warm-up"] = message(lambda: megatron_lowbit.apply(model, index))
    if name == "cuda_graph_impl":
        layer.config.cuda_graph_impl = "full_iteration"
        found["warm-up"] += message(lambda: megatron_lowbit.apply(model, index))
    layer.config.cuda_graph_warmup_steps = steps
    setattr(layer.config, name, before)
    return found


def whole_steps(handle) -> str:
    """What is said of a graph of whole training steps, of which a process has one."""
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper

    FullCudaGraphWrapper.cuda_graph["training"] = object()
    try:
        return message(handle.remove)
    finally:
        FullCudaGraphWrapper.cuda_graph["training"] = None


def graphs(model, index) -> dict[str, str]:
    """What is said of CUDA graphs, of which a machine without CUDA can have none.

    A manager of Megatron's own class says that it has captured one.
    """
    from types import SimpleNamespace

    from megatron.core.transformer import cuda_graphs

    layer = model.decoder.layers[0]
    manager = cuda_graphs.CudaGraphManager.__new__(cuda_graphs.CudaGraphManager)
    torch.nn.Module.__init__(manager)
    manager.cudagraph_runners = [SimpleNamespace(fwd_graph=None)]
    handle = megatron_lowbit.apply(model, index)
    layer.cudagraph_manager = manager
    found = {"not captured": message(handle.remove)}
    manager.cudagraph_runners[0].fwd_graph = object()
    found["captured before"] = message(lambda: megatron_lowbit.apply(model, index))
    manager.cudagraph_runners[0].fwd_graph = None
    handle = megatron_lowbit.apply(model, index)
    manager.cudagraph_runners[0].fwd_graph = object()
    found["captured after"] = message(handle.remove)
    found["still there"] = str(handle)
    del layer.cudagraph_manager
    found["whole steps"] = whole_steps(handle)
    handle.remove()
    found |= refused_graphs(model, index, message)
    runner = inspect.getsource(cuda_graphs._CudaGraphRunner)
    found["attributes"] = "self.fwd_graph = " in runner and "self.cudagraph_runners" in (
        inspect.getsource(cuda_graphs.CudaGraphManager)
    )
    return found


def begin(brief: str) -> argparse.Namespace:
    """The command line, in which `brief` says what --brief leaves; then the groups of ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--brief", action="store_true", help=brief)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(dist.get_world_size())
    return args


def main() -> None:
    enable_cpu_engines()
    args = begin("the engines only")
    out = args.out
    import megatron.core

    model = build(torch.float32)
    index, _ = make_index(model, out)
    results = {
        "version": megatron.core.__version__,
        "features": features(),
        "native": plain(model),
        "low": low_bits(model, index, engines),
        "after": greedy(dynamic_engine(model)),
        "sequence_parallel": sequence_parallel(index),
    }
    if not args.brief:
        leave_engine_mode()
        rounded = build(torch.bfloat16)
        rounded_index, _ = make_index(rounded, out / "bf16")
        results |= {
            "bf16": low_bits(rounded, rounded_index, in_bf16),
            "tuned": tuned(model, index, out),
            "speculative": speculative(out / "mtp"),
            "graphs": graphs(model, index),
        }
    torch.save(results, out / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
