"""Megatron's inference engines in low bits, on each supported release, at TP 2 over Gloo.

The model is small and random, in fp32, where static and dynamic engine give the same greedy tokens.
The engines themselves run on every release, all the rest where `all_of_it` is asked for.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engines import (
    ALONE,
    DYNAMIC_INSIDE,
    NEW_TOKENS,
    PROMPTS,
    SUMS,
    alone,
    assert_carried,
    counted,
    dynamic_engine,
    greedy,
    high_level_api,
    needs,
    static_engine,
    with_prediction_head,
)
from graphed_engines import DECODE_ONLY, captured_sums, graphed, graphs_on_a_cpu, watched
from on_ranks import directory_of_all
from releases import RELEASES
from small_gpt import LAYERS, alike, build, index_of, low, start_megatron

import megatron_lowbit
from megatron_lowbit.comm.policy.policy import Settings
from megatron_lowbit.comm.policy.timings import Case, Timings
from megatron_lowbit.comm.policy.tuning import Tuning, this_machine, write_tuning
from megatron_lowbit.integration.cpu.attention import enable_cpu_engines

pytestmark = pytest.mark.on_ranks(2)
ENGINES = [static_engine, dynamic_engine]


@pytest.fixture(scope="module", params=RELEASES)
def release(request):
    start_megatron(request.param)
    enable_cpu_engines()
    return request.param


@pytest.fixture
def all_of_it(release):
    if release < "0.16":
        pytest.skip("of this release the engines themselves only")


@pytest.fixture(scope="module")
def model(release):
    return build(torch.float32)


@pytest.fixture(scope="module")
def native(model):
    """The static engine's tokens."""
    return greedy(static_engine(model))


@pytest.fixture(scope="module")
def lossy(model, index):
    """The static engine's tokens in low bits."""
    with one_shot(model, index):
        tokens = greedy(static_engine(model))
    return alike(tokens)


@contextlib.contextmanager
def one_shot(model, index) -> Iterator[list]:
    """Low bits, where each sum of each forward pass must be counted and its error carried."""
    with low(model, index) as handle, counted(model) as seen:
        yield seen
        points = handle.stats()["sync_points"]
        assert len(points) == SUMS
        for point in points:
            (choice,) = point["choices"]
            assert (choice["collective"], choice["calls"]) == ("one-shot", seen.count("forward"))
        assert_carried(handle)


@pytest.mark.support("dynamic inference engine")
def test_the_dynamic_engine_on_a_cpu_gives_the_static_engines_tokens(model, native):
    assert greedy(dynamic_engine(model)) == native
    assert [len(tokens) for tokens in native] == [NEW_TOKENS] * len(PROMPTS)


@pytest.mark.support("static inference engine")
@pytest.mark.support("dynamic inference engine")
@pytest.mark.support("error feedback")
def test_engines_agree_in_low_bits(model, index, native, lossy):
    """Every sum of every step is counted and its error carried, as `one_shot` asserts."""
    with one_shot(model, index) as seen:
        tokens = greedy(dynamic_engine(model))
    assert seen.count("forward") >= NEW_TOKENS
    assert tokens == lossy != native
    assert greedy(dynamic_engine(model)) == native, "given back"


@pytest.mark.support("static engine around a dynamic one")
def test_the_static_engine_around_a_dynamic_one(model, index, lossy):
    needs(DYNAMIC_INSIDE)
    with one_shot(model, index):
        engine = static_engine(model, legacy=False)
        assert hasattr(engine, "dynamic_engine"), "Megatron falls back with a warning only"
        assert greedy(engine) == lossy


def test_the_high_level_api(model, index, lossy):
    """`MegatronLLM` without a coordinator, every rank calling it."""
    needs("MegatronLLM")
    with one_shot(model, index):
        assert greedy(high_level_api(model)) == lossy


@pytest.mark.support("static inference engine")
@pytest.mark.support("dynamic inference engine")
@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_do_not_depend_on_the_batch(model, index, lossy, engine):
    """Nor on the padding to the longest prompt, or to a multiple of 64 tokens."""
    with one_shot(model, index):
        assert alone(engine(model)) == lossy[:ALONE]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_mlp_in_chunks_of_the_prompt_stands_outside_the_chain(all_of_it, engine):
    """Its second chunk has the shape of the first, and other tokens."""
    model = build(torch.float32, mlp_chunks_for_prefill=2)
    with low(model, index_of(model)) as handle:
        tokens = alike(greedy(engine(model)))
        assert alone(engine(model)) == tokens[:ALONE]
        reasons = [status.feedback for status in handle.status()]
        assert reasons == ["carried", "off: the MLP runs in chunks of the prompt"] * LAYERS
        calls = [point["choices"][0]["calls"] for point in handle.stats()["sync_points"]]
        assert calls[1] > calls[0], "an MLP sums each chunk"
        assert handle.feedback()["dropped"] == 0


def test_bf16(all_of_it):
    """The dynamic engine only: the static one rounds its attention in other places."""
    model = build(torch.bfloat16)
    index = index_of(model)
    with one_shot(model, index):
        tokens = alike(greedy(dynamic_engine(model)))
        assert alone(dynamic_engine(model)) == tokens[:ALONE]
        assert greedy(dynamic_engine(model, chunked=True, max_tokens=64)) == tokens


@pytest.mark.support("dynamic engine: chunked prefill")
def test_chunked_prefill(model, index, lossy):
    """Steps of 64 tokens, in which prompts are cut and mixed with others' decoding."""
    needs("chunked prefill")
    with one_shot(model, index) as seen:
        assert greedy(dynamic_engine(model, chunked=True, max_tokens=64)) == lossy
    sizes = [entry[0] for entry in alike(seen) if entry != "forward"]
    assert min(sizes) < max(sizes) == 64
    assert sizes.count(64) >= 3 * SUMS, "more prompt tokens than two steps take"


@pytest.mark.support("dynamic engine: prefix caching")
def test_prefix_caching(model, index, lossy):
    """Blocks that another request has filled are not computed again; the tokens stay."""
    needs("prefix caching")
    with one_shot(model, index):
        engine = dynamic_engine(model, enable_prefix_caching=True)
        assert greedy(engine) == lossy
    assert engine._prefill_tokens_skipped == 24


@pytest.mark.support("dynamic engine: speculative decoding")
def test_speculative_decoding(release):
    """Guesses cost sums of more tokens a step, and change no token; the heads stay native."""
    needs("speculative decoding")
    model = with_prediction_head(build(torch.float32).config)
    index = index_of(model)
    native = greedy(dynamic_engine(model))
    with low(model, index) as handle:
        assert len([name for name in handle.native if "mtp" in name]) == 2
        plain = alike(greedy(dynamic_engine(model)))
        assert plain != native, "low bits are seen"
        engine = dynamic_engine(model, num_speculative_tokens=1)
        with counted(model) as seen:
            assert greedy(engine) == plain
        assert seen.count("forward") < NEW_TOKENS
        accepted, proposed = (
            int(getattr(engine, f"_spec_tokens_{kind}_per_pos").sum())
            for kind in ("accepted", "proposed")
        )
        assert 0 < accepted < proposed
        assert alone(dynamic_engine(model, num_speculative_tokens=1)) == plain[:ALONE]
        assert_carried(handle)


@pytest.mark.support("dynamic engine: sequence parallel")
@pytest.mark.parametrize("gather", [None, 6])
def test_sequence_parallelism(index, native, lossy, gather):
    """A reduce-scatter quantizes what the one-shot all-reduce does: the same tokens.

    The weights are the same, too, so the same index serves.
    """
    needs("sequence parallelism")
    model = build(torch.float32, sequence_parallel=True)
    assert greedy(dynamic_engine(model)) == native
    with low(model, index, all_gather_bits=gather) as handle:
        tokens = alike(greedy(dynamic_engine(model)))
        assert alone(dynamic_engine(model)) == tokens[:ALONE]
        total = handle.stats()["total"]
        assert_carried(handle)
    assert gather or tokens == lossy
    collectives = ["reduce-scatter", "all-gather"][: 2 if gather else 1]
    assert [choice["collective"] for choice in total] == collectives
    assert len({choice["calls"] for choice in total}) == 1


def tuning_file(kinds) -> Path:
    """By which large messages go low-bit, and small ones native."""
    milliseconds = {Case("", False, "native"): (0.1, 10.0)}
    milliseconds |= {kind.case("one-shot"): (1.0, 1.0) for kind in kinds}
    milliseconds |= {kind.case("two-shot"): (2.0, 2.0) for kind in kinds}
    times = {  # of 10 and 21 tokens
        case: {1024: (short,) * 6, 2048: (long,) * 6}
        for case, (short, long) in milliseconds.items()
    }
    path = directory_of_all("tuning") / "tuning.json"
    if dist.get_rank() == 0:
        write_tuning(Tuning(this_machine(), 2, None, "as it is", Timings(times)), path)
    dist.barrier()
    return path


def test_auto_chooses_alike_on_all_ranks_at_every_step(all_of_it, model, index):
    """By size: steps of prefill in low bits, steps of decoding natively, by this tuning file."""
    with low(model, index) as handle:
        path = tuning_file(handle.kinds)
    with low(model, index, collective=Settings(tuning=path)) as handle, counted(model) as seen:
        tokens = greedy(dynamic_engine(model, max_tokens=64, chunked=True))
        total = handle.stats()["total"]
    alike((seen, tokens))
    sums = [entry for entry in seen if entry != "forward"]
    assert len({size for size, _ in sums}) == len(set(sums)), "one choice for each size"
    calls = Counter(collective for _, collective in sums)
    assert set(calls) == {"native", "one-shot"}
    assert {choice["collective"]: choice["calls"] for choice in total} == calls


@pytest.fixture
def graphs():
    with graphs_on_a_cpu():
        yield


@pytest.mark.support("dynamic engine: CUDA-graphed decode (on a stand-in)")
def test_graphed_decode(index, lossy, graphs):
    """A step of prefill sums in Python, one of decoding only replays a graph a layer."""
    model = graphed()
    handle = megatron_lowbit.apply(model, index, collective="one-shot")
    engine = dynamic_engine(model, **DECODE_ONLY)
    captured = captured_sums(handle)
    assert (captured["calls"], captured["seconds"]) == (SUMS, 0)
    run = watched(model, engine)
    assert run.tokens == lossy
    steps = run.seen.count("forward")
    prefills, rest = divmod(len(run.seen) - steps, SUMS)
    assert (rest, prefills > 0) == (0, True)
    replayed = steps - prefills
    assert replayed >= NEW_TOKENS - 1
    assert run.replays == LAYERS * replayed
    assert run.sent_bytes == replayed * captured["sent_bytes"] > 0
    assert captured_sums(handle) == captured, "replays are not counted"
    assert_carried(handle)
