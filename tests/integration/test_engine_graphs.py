"""CUDA graphs and low bits at TP 2: what is refused, and the dynamic engine's, on a stand-in.

test_engines.py has graphs of decoding on each release.
"""

import contextlib
import inspect
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from engines import NEW_TOKENS, dynamic_engine, greedy, with_prediction_head
from graphed_engines import DECODE_ONLY, Run, clean, graphed, graphs_on_a_cpu, watched
from releases import MAIN, NEWEST
from small_gpt import LAYERS, alike, build, index_of, low, message, refusal, start_megatron

import megatron_lowbit
from megatron_lowbit.integration.cpu.attention import enable_cpu_engines
from megatron_lowbit.integration.sums import reducer

pytestmark = pytest.mark.on_ranks(2)


@pytest.fixture(scope="module", params=["0.16.1", NEWEST, MAIN])
def release(request):
    start_megatron(request.param)
    enable_cpu_engines()
    return request.param


@pytest.fixture(scope="module")
def model(release):
    return build(torch.float32)


@pytest.fixture
def runner(model):
    """Of the first layer's graph, not captured, in a manager of Megatron's own class."""
    from megatron.core.transformer.cuda_graphs import CudaGraphManager

    manager = CudaGraphManager.__new__(CudaGraphManager)
    torch.nn.Module.__init__(manager)
    manager.cudagraph_runners = [SimpleNamespace(fwd_graph=None)]
    layer = model.decoder.layers[0]
    layer.cudagraph_manager = manager
    yield manager.cudagraph_runners[0]
    del layer.cudagraph_manager


@pytest.fixture
def config(model, monkeypatch):
    """Of a model of which Megatron is to capture the layers."""
    config = model.decoder.layers[0].config
    monkeypatch.setattr(config, "cuda_graph_impl", "local")
    return config


def test_megatron_has_the_attributes_that_are_looked_at(release):
    from megatron.core.transformer import cuda_graphs

    assert "self.fwd_graph = " in inspect.getsource(cuda_graphs._CudaGraphRunner)
    assert "self.cudagraph_runners" in inspect.getsource(cuda_graphs.CudaGraphManager)


def test_a_model_with_captured_graphs_is_left_alone(model, index, runner):
    with low(model, index) as handle:
        runner.fwd_graph = object()
        said = message(handle.remove)
        assert re.search(r"remove\(\) would not reach .* delete_cuda_graphs\(\)", said), said
        assert "4 sync points" in str(handle), "a refused remove() changes nothing"
        runner.fwd_graph = None  # not captured: nothing is refused
    runner.fwd_graph = object()
    said = refusal(model, index)
    assert "apply() would not reach the CUDA graphs that decoder.layers.0" in said


def test_a_graph_of_whole_training_steps_is_not_reached(model, index, monkeypatch):
    """Of which a process has one."""
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper

    with low(model, index) as handle, monkeypatch.context() as patch:
        patch.setitem(FullCudaGraphWrapper.cuda_graph, "training", object())
        said = message(handle.remove)
        assert "remove() would not reach the CUDA graph of whole training steps" in said
        assert "4 sync points" in str(handle), "a refused remove() changes nothing"


def test_graphs_of_training_refuse_gathers(model, index, config):
    megatron_lowbit.apply(model, index).remove()  # nothing else
    model.decoder.layers[0].train()
    said = refusal(model, index, all_gather_bits=6)
    model.eval()
    text = "--lowbit-all-gather uses forward pre-hooks, .* refuse in training"
    assert re.search(text, said), said


@pytest.mark.parametrize("impl", ["local", "full_iteration"])
def test_graphs_need_a_step_of_warm_up(model, index, config, monkeypatch, impl):
    monkeypatch.setattr(config, "cuda_graph_impl", impl)
    monkeypatch.setattr(config, "cuda_graph_warmup_steps", 0)
    said = refusal(model, index)
    assert "cuda_graph_warmup_steps is 0" in said


@pytest.fixture
def graphs(release, index):
    if release == "0.16.1":
        pytest.skip("of this release graphs of decoding only")
    with graphs_on_a_cpu():
        yield


def like_eager(
    plain, model, index, *, steps: dict = DECODE_ONLY, all_gather_bits: int | None = None, **engine
) -> Run:
    """A run with graphs, which must give the tokens of the plain model's eager steps."""
    wishes = {"collective": "one-shot", "all_gather_bits": all_gather_bits}
    with low(plain, index, **wishes):
        eager = alike(greedy(dynamic_engine(plain, **engine)))
    clean()
    megatron_lowbit.apply(model, index, **wishes)
    run = watched(model, dynamic_engine(model, **steps, **engine))
    assert run.tokens == eager
    assert run.replays > 0
    assert run.sent_bytes > 0
    return run


def test_graphs_of_every_step(model, index, graphs):
    """Of prefill, too."""
    run = like_eager(model, graphed(), index, steps={"num_cuda_graphs": 1})
    assert set(run.seen) == {"forward"}, "no sum runs in Python"


def test_graphs_of_the_whole_decoder(model, index, graphs):
    from megatron.core.transformer.enums import InferenceCudaGraphScope

    like_eager(model, graphed(inference_cuda_graph_scope=InferenceCudaGraphScope.block), index)


def test_graphs_with_gathers_in_low_bits(index, graphs):
    plain = build(torch.float32, sequence_parallel=True)
    like_eager(plain, graphed(sequence_parallel=True), index, all_gather_bits=6)


def test_graphs_of_a_head_that_guesses(graphs):
    """It has graphs of its own."""
    plain = with_prediction_head(build(torch.float32).config)
    index = index_of(plain)
    like_eager(plain, with_prediction_head(graphed().config), index, num_speculative_tokens=1)


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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_CudaGraphRunner, "replay_graph_capture", comparing)
        yield seen


def test_every_replay_gives_eagers_bits(index, graphs):
    """Megatron's runners, each call once with its graph and once without, on the same input."""
    model = graphed()
    megatron_lowbit.apply(model, index, collective="one-shot")
    engine = dynamic_engine(model, **DECODE_ONLY)
    with compared() as seen:
        greedy(engine)
    assert len(seen) >= LAYERS * (NEW_TOKENS - 1)
    assert len({given for *_, given in seen}) == len(seen), "inputs differ"
    assert all(same and untouched for same, untouched, _ in seen)


def test_graphs_can_be_captured_anew(model, index, graphs):
    """After Megatron's delete_cuda_graphs(), and not before: native ones, then two-shot ones."""
    from megatron.core.transformer.cuda_graphs import delete_cuda_graphs

    native = alike(greedy(dynamic_engine(model)))
    with low(model, index, collective="two-shot"):
        two_shot = alike(greedy(dynamic_engine(model)))
    assert native != two_shot
    clean()
    other = graphed()
    handle = megatron_lowbit.apply(other, index, collective="one-shot")
    engine = dynamic_engine(other, **DECODE_ONLY)
    assert "remove() would not reach the CUDA graphs" in message(handle.remove)
    delete_cuda_graphs()
    handle.remove()
    engine.create_cuda_graphs()
    run = watched(other, engine)
    assert (run.tokens, run.replays > 0) == (native, True)
    assert run.sent_bytes == 0, "by collectives of the backend"
    said = refusal(other, index)
    assert "apply() would not reach the CUDA graphs" in said
    delete_cuda_graphs()
    megatron_lowbit.apply(other, index, collective="two-shot")
    engine.create_cuda_graphs()
    run = watched(other, engine)
    assert (run.tokens, run.replays > 0) == (two_shot, True)


def test_a_capture_refuses_a_sum_that_looks_at_a_value(index, graphs, monkeypatch):
    original = reducer.all_reduce

    def looking(partial, **call):
        return original(partial * partial.isfinite().all().item(), **call)

    model = graphed()
    megatron_lowbit.apply(model, index, collective="one-shot")
    monkeypatch.setattr(reducer, "all_reduce", looking)
    with pytest.raises(RuntimeError) as error:
        dynamic_engine(model, **DECODE_ONLY)
    expected = "operation not permitted when stream is capturing: aten::item"
    assert str(error.value) == expected
