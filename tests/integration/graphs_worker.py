"""Megatron's dynamic engine with CUDA graphs in low bits; run by test_engines.py in forked ranks.

Managers and runners of graphs are Megatron's own, over cuda_graph_stand_in.py. Rank by rank writes
what it saw to OUT/rankN.pt.
"""

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cuda_graph_stand_in
import engines_worker
import torch
import torch.distributed as dist
from cuda_graph_stand_in import CUDAGraph
from engines_worker import accepted, begin, counted, dynamic_engine, greedy, has_new_config
from small_gpt import build, make_index, message

import megatron_lowbit
from megatron_lowbit.comm.traffic import Clock
from megatron_lowbit.integration.cpu.attention import enable_cpu_engines
from megatron_lowbit.integration.cpu.device import CpuEvent
from megatron_lowbit.kernels.switches import SWITCH

DECODE_ONLY = {"num_cuda_graphs": 1, "use_cuda_graphs_for_non_decode_steps": False}


def stand_in() -> None:
    """Graphs, attention that looks at values as one step of them, and the clocks of a GPU."""
    os.environ[SWITCH] = "0"  # the dispatcher does not see C
    enable_cpu_engines()
    cuda_graph_stand_in.install()
    attention = importlib.import_module("megatron.core.transformer.attention")
    for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):
        setattr(attention, name, cuda_graph_stand_in.opaque(getattr(attention, name)))
    # A GPU is late: nothing has passed when the host asks.
    CpuEvent.query = cuda_graph_stand_in.not_in_a_capture(lambda event: False)
    collectives = importlib.import_module("megatron_lowbit.comm.all_reduce")
    collectives.Clock = lambda device: Clock(torch.device("cuda"))


def graphed(**config):
    """The model of which Megatron captures the layers, in the words of this release."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    on = {"cuda_graph_impl": "local", "enable_cuda_graph": True}
    name = next(name for name in on if name in accepted(TransformerConfig, on))
    return build(torch.float32, **{name: on[name]}, **config)


def engine_of(model, *, options: dict = DECODE_ONLY, **others):
    """An engine, by default with a graph for steps that only decode."""
    from megatron.core.inference.contexts import DynamicInferenceContext as config

    if has_new_config():
        from megatron.core.inference.config import InferenceConfig as config
    return dynamic_engine(model, **accepted(config, options), **others)


def replays() -> int:
    return sum(graph.replays for graph in CUDAGraph.captured)


def watched(model, engine) -> dict:
    """New tokens, what went through the model in Python, and what replays did."""
    before, sent = replays(), sum(graph.sent_bytes for graph in CUDAGraph.captured)
    with counted(model) as seen:
        tokens = greedy(engine)
    return {
        "tokens": tokens,
        "seen": seen,
        "replays": replays() - before,
        "sent_bytes": sum(graph.sent_bytes for graph in CUDAGraph.captured) - sent,
    }


def eager_and_graphed(index, *, options: dict = DECODE_ONLY, config=None, eager=None, **wishes):
    """Tokens of a model without graphs and, with all else that is `watched`, of one with them."""
    plain = build(torch.float32, **(eager or {}))
    megatron_lowbit.apply(plain, index, collective="one-shot", **wishes)
    result = {"eager": greedy(dynamic_engine(plain))}
    clean()
    model = graphed(**(eager or {}), **(config or {}))
    handle = megatron_lowbit.apply(model, index, collective="one-shot", **wishes)
    engine = engine_of(model, options=options)
    result["stats of the capture"] = handle.stats()
    result |= watched(model, engine) | {"stats": handle.stats(), "feedback": handle.feedback()}
    return result


def clean() -> None:
    """Engines and graphs leave marks on the process."""
    engines_worker.leave_engine_mode()
    with contextlib.suppress(ImportError):
        from megatron.core.transformer.cuda_graphs import delete_cuda_graphs

        delete_cuda_graphs()


@contextlib.contextmanager
def compared() -> Iterator[list]:
    """Calls each layer once more without its graph: (same bits, input untouched, the input)."""
    from megatron.core.transformer.cuda_graphs import _CudaGraphRunner

    replay, seen = _CudaGraphRunner.replay_graph_capture, []

    def comparing(runner, first, args, kwargs):
        given = kwargs["hidden_states"].clone()
        out = replay(runner, first, args, kwargs)
        eager = torch.nn.Module.__call__(runner.base_module, *args, **kwargs)
        untouched = torch.equal(given, kwargs["hidden_states"])
        seen.append((torch.equal(out[0], eager[0]), untouched, given.sum().item()))
        return out

    _CudaGraphRunner.replay_graph_capture = comparing
    try:
        yield seen
    finally:
        _CudaGraphRunner.replay_graph_capture = replay


def in_turn(index) -> dict:
    """One engine: its replays compared, then native graphs, then two-shot ones."""
    from megatron.core.transformer.cuda_graphs import delete_cuda_graphs

    plain, result = build(torch.float32), {}
    result["native eager"] = greedy(dynamic_engine(plain))
    megatron_lowbit.apply(plain, index, collective="two-shot")
    result["two-shot eager"] = greedy(dynamic_engine(plain))
    clean()
    model = graphed()
    handle = megatron_lowbit.apply(model, index, collective="one-shot")
    engine = engine_of(model)
    with compared() as result["compared"]:
        greedy(engine)
    result["remove"] = message(handle.remove)
    delete_cuda_graphs()
    handle.remove()
    engine.create_cuda_graphs()
    result["native"] = watched(model, engine)
    result["apply"] = message(lambda: megatron_lowbit.apply(model, index))
    delete_cuda_graphs()
    megatron_lowbit.apply(model, index, collective="two-shot")
    engine.create_cuda_graphs()
    result["two-shot"] = watched(model, engine)
    return result


def speculative(out: Path) -> dict:
    """Guesses of a multi-token-prediction head, which has graphs of its own."""
    plain = engines_worker.with_prediction_head()
    index, _ = make_index(plain, out)
    megatron_lowbit.apply(plain, index, collective="one-shot")
    result = {"eager": greedy(dynamic_engine(plain, num_speculative_tokens=1))}
    clean()
    engines_worker.build = lambda dtype: graphed()
    model = engines_worker.with_prediction_head()
    megatron_lowbit.apply(model, index, collective="one-shot")
    return result | watched(model, engine_of(model, num_speculative_tokens=1))


def waiting(index) -> str:
    """What a capture says of a sum that looks at a value."""
    module = importlib.import_module("megatron_lowbit.integration.sums.reducer")
    original = module.all_reduce

    def looking(partial, **call):
        return original(partial * partial.isfinite().all().item(), **call)

    model = graphed()
    megatron_lowbit.apply(model, index, collective="one-shot")
    module.all_reduce = looking
    try:
        engine_of(model)
    except RuntimeError as error:
        return str(error)
    finally:
        module.all_reduce = original
    return "no error"


def cases(index, out: Path) -> dict:
    """What only newer releases have, or what is not their own affair."""
    found = engines_worker.features()
    every_step = {"num_cuda_graphs": 1}
    run = functools.partial(eager_and_graphed, index)
    results = {"every step": run(options=every_step)}
    clean()
    results["sequence parallel"] = run(eager={"sequence_parallel": True}, all_gather_bits=6)
    with contextlib.suppress(ImportError):
        from megatron.core.transformer.enums import InferenceCudaGraphScope

        clean()
        results["block"] = run(config={"inference_cuda_graph_scope": InferenceCudaGraphScope.block})
    clean()
    results["in turn"] = in_turn(index)
    clean()
    if "speculative decoding" in found:
        results["speculative"] = speculative(out / "mtp")
        clean()
    results["waiting"] = waiting(index)
    return results


def main() -> None:
    stand_in()
    args = begin("one engine only")
    import megatron.core

    index, _ = make_index(build(torch.float32), args.out)
    results = {"version": megatron.core.__version__, "decode": eager_and_graphed(index)}
    if not args.brief:
        clean()
        results |= cases(index, args.out)
    torch.save(results, args.out / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
