"""Each capability on each supported release of megatron-core: the rows of the support matrix.

Tensor parallel 2 x data parallel 2, then tensor parallel 2 x pipeline parallel 2. What is asserted
of a row is what its cell in the table of integration/README.md means by "yes".
"""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from chain_oracle import CODECS, check_codecs
from on_ranks import directory_of_all
from pipeline_chunks import LAYERS, build_chunks, run_schedule, shaped, with_chunks
from releases import RELEASES
from small_gpt import (
    ATTENTION,
    MLP,
    MOE,
    OVERLAP,
    POINTS,
    SHARED_EXPERTS,
    assert_alike,
    build,
    index_of,
    low,
    make_index,
    message,
    native_calls,
    of_all_ranks,
    refusal,
    rules,
    start_megatron,
    whole_logits,
)

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.calibration.saved_state import Progress

pytestmark = pytest.mark.on_ranks(4)


def points_of(layers, mlp: str = MLP) -> list[tuple[int, str]]:
    return [(layer, name) for layer in layers for name in (ATTENTION, mlp)]


@pytest.fixture(scope="module", params=RELEASES)
def release(request):
    start_megatron(request.param, 2)
    return request.param


@pytest.fixture(scope="module")
def parallel(release):
    """A model with sequence parallelism, and its index."""
    model = build(torch.bfloat16, sequence_parallel=True)
    return model, index_of(model)


@pytest.mark.support("local spec, TP 2")
def test_local_spec(model, index):
    check_codecs(model, index, POINTS)


@pytest.mark.support("local spec, TP 2")
def test_only_sync_points_are_replaced_and_given_back(model, index):
    """Natively the function is called at 2 sync points a layer and in the embedding."""
    assert native_calls(model) == len(POINTS) + 1
    before = {key: value for key, value in model.state_dict().items() if value is not None}
    for codec in CODECS:
        with low(model, index, codec=codec) as handle:
            assert native_calls(model) == 1, "the embedding stays native"
        handle.remove()  # a second time
        after = {key: value for key, value in model.state_dict().items() if value is not None}
        assert list(after) == list(before)
        assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert native_calls(model) == len(POINTS) + 1


@pytest.mark.support("calibration")
def test_calibration(model):
    """The index of all rows is made on the release itself."""
    assert make_index(model, directory_of_all("partial"))[1] == Progress(done=5)


@pytest.mark.support("sequence parallel")
def test_sequence_parallel(parallel):
    check_codecs(*parallel, POINTS)


@pytest.mark.support("sequence parallel with all-gathers in low bits")
@pytest.mark.parametrize("codec", CODECS)
def test_all_gathers(parallel, codec):
    """They cost a little quality, in `rotated-hybrid` and beside BF16 sums alike."""
    model, index = parallel
    native = whole_logits(model)
    wishes = {"codec": codec, "collective": "two-shot"}
    with low(model, index, **wishes):
        plain = whole_logits(model)
    with low(model, index, **wishes, all_gather_bits=6) as handle:
        logits, stats = whole_logits(model), handle.stats()
    assert_alike(logits)
    assert 8 < sqnr(native, logits) < 40
    assert not torch.equal(logits, plain)
    assert torch.equal(whole_logits(model), native)
    assert [choice["collective"] for choice in stats["total"]] == ["reduce-scatter", "all-gather"]
    assert [choice["calls"] for choice in stats["total"]] == [4, 4]
    assert [gather["bits_per_value"] < 6.5 for gather in stats["all_gathers"]] == [True] * 4


@pytest.mark.support("sequence parallel")
def test_sequence_parallelism_that_is_switched_off(parallel):
    """As engines do for decoding: sync points all-reduce then, and nothing is gathered."""
    model = build(torch.bfloat16, sequence_parallel=True)
    native = whole_logits(model)
    with low(model, parallel[1], all_gather_bits=6) as handle:
        for module in model.modules():
            if getattr(module, "sequence_parallel", False) is True:
                module.sequence_parallel = False
        embedding = model.embedding
        embedding.scatter_to_sequence_parallel = embedding.reduce_scatter_embeddings = False
        embedding.word_embeddings.reduce_scatter_embeddings = False
        model.config.sequence_parallel = False
        logits = whole_logits(model)
        assert [choice["collective"] for choice in handle.stats()["total"]] == ["one-shot"]
    assert_alike(logits)
    assert 8 < sqnr(native, logits) < 40


@pytest.mark.support("MoE with a shared expert")
@pytest.mark.parametrize("config", [MOE, OVERLAP], ids=["beside", "overlapped"])
def test_experts(release, config):
    """A shared expert is a sync point; routed experts stay native and are listed."""
    model = build(torch.bfloat16, **config)
    index = index_of(model)
    check_codecs(model, index, points_of([1, 2], SHARED_EXPERTS))
    with low(model, index) as handle:
        assert sorted(handle.native) == [f"layer {n} mlp.token_dispatcher" for n in (1, 2)]
        text = "2 stay native (2: routed experts, summed by the token dispatcher"
        assert text in str(handle)


LINEAR = "megatron.core.tensor_parallel.layers.RowParallelLinear.forward"
LAYER = "megatron.core.transformer.transformer_layer.BaseTransformerLayer"
FUNCTION = "megatron.core.tensor_parallel.mappings.reduce_from_tensor_model_parallel_region"


@pytest.mark.parametrize(
    ("symbol", "value", "by_apply", "by_calibrate"),
    [
        (
            LINEAR,
            lambda self, x: None,
            f"^this megatron-core .*{LINEAR} does not use the attribute explicit_expert_comm, "
            r"sequence_parallel, skip_bias_add \(needed to have its partial instead of its sum\)",
            "",
        ),
        (LAYER, None, f"{LAYER} is missing", f"{LAYER} is missing"),
        (
            FUNCTION,
            lambda x: x,
            "^no error$",  # only calibration needs it
            r"takes no parameter group \(needed to sum natively",
        ),
    ],
    ids=["forward", "class", "function"],
)
def test_doctored_release(model, index, native, monkeypatch, symbol, value, by_apply, by_calibrate):
    """Refused before anything is changed, with the symbol and what it is needed for."""
    with monkeypatch.context() as patch:
        patch.setattr(symbol, value) if value else patch.delattr(symbol)
        applying = refusal(model, index)
        calibrating = message(lambda: index_of(model))
    assert re.search(by_apply, applying, re.DOTALL), applying
    assert re.search(by_calibrate, calibrating), calibrating
    assert torch.equal(whole_logits(model), native)


@pytest.fixture(
    scope="class",  # the groups are a pipeline's for as long
    params=[
        pytest.param(None, marks=pytest.mark.support("pipeline parallel 2 x TP 2")),
        pytest.param(2, marks=pytest.mark.support("interleaved pipeline 2 x TP 2")),
    ],
    ids=["pipeline", "interleaved"],
)
def stage(release, request):
    """A stage of two layers, in a chunk of both or in two; what the whole model gives, by case.

    The index is that of the whole model. Errors that are carried end with a chunk: without them the
    split is not seen in the bits.
    """
    virtual = request.param
    whole = build(torch.bfloat16, num_layers=LAYERS)
    index = index_of(whole)
    expected = check_codecs(whole, index, points_of([1, 2, 3, 4]), feedback=False)
    with low(whole, index, fold=True):
        expected["folded"] = whole_logits(whole)
    with with_chunks(whole, index, virtual or 1):
        expected["carried"] = whole_logits(whole)
    degrees = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": virtual}
    start_megatron(release, 2, **degrees)
    is_last = dist.get_rank() > 1
    layers = [(1, 3), (2, 4)] if virtual else [(1, 2), (3, 4)]
    yield SimpleNamespace(
        index=index,
        expected=expected,
        chunks=build_chunks(virtual or 1, whole),
        is_last=is_last,
        layers=layers[is_last],
        last_layers=layers[1],
        is_interleaved=virtual is not None,
    )
    start_megatron(release, 2)


def check_logits(stage, logits: list[torch.Tensor], case: str) -> None:
    """Of two micro-batches, on the last stage: the bits of the whole model, alike on its ranks."""
    assert len(logits) == (2 if stage.is_last else 0)
    everywhere = of_all_ranks(logits)
    if stage.is_last:
        assert torch.equal(logits[0], stage.expected[case])
        assert torch.equal(logits[1], everywhere[2][1])
        assert not torch.equal(logits[0], logits[1])


class TestPipeline:
    @pytest.fixture(autouse=True)
    def _left_as_it_was(self, stage):
        """So is a stage, natively, by each test."""
        yield
        check_logits(stage, run_schedule(stage.chunks), "native")

    @pytest.mark.parametrize("codec", CODECS)
    def test_two_stages_give_the_bits_of_one(self, stage, codec):
        """By an index of global layer numbers."""
        with low(stage.chunks, stage.index, codec=codec, feedback=False) as handle:
            check_logits(stage, run_schedule(stage.chunks), codec)
            assert [(p.layer, p.name) for p in handle.status()] == points_of(stage.layers)
            first, second = stage.layers
            assert f"4 sync points of layers {first}, {second} use {codec}" in str(handle)

    def test_two_stages_give_the_bits_of_one_with_folded_weights(self, stage):
        with low(stage.chunks, stage.index, fold=True):
            check_logits(stage, run_schedule(stage.chunks), "folded")

    def test_a_chunk_is_a_chain_of_its_own(self, stage):
        """Its last sync point gives to nobody: it has more bits."""
        with low(stage.chunks, shaped(stage.index)) as handle:
            check_logits(stage, run_schedule(stage.chunks), "carried")
            bits = [status.codec.bits for status in handle.status()]
            assert bits == ([4, 6, 4, 6] if stage.is_interleaved else [4, 4, 4, 6])
            assert handle.feedback()["sync_points"] == 4
            assert handle.feedback()["dropped"] == 0
            assert "errors carried between 4 sync points" in str(handle)

    def test_a_rule_leaves_a_stage_native(self, stage):
        """Low bits on the first stage only."""
        left = ({"match": f"{n}.*", "codec": "native"} for n in stage.last_layers)
        with low(stage.chunks, stage.index, recipe=rules(*left), fold=True) as handle:
            logits, text = run_schedule(stage.chunks), str(handle)
            where = "of layers {}, {} use".format(*stage.layers)
            if stage.is_last:
                assert f"no sync point {where}s it; 4 stay native (4: left native by rules" in text
                assert 8 < sqnr(stage.expected["native"], logits[0]) < 40
                assert not torch.equal(logits[0], stage.expected["rotated-hybrid"])
            else:
                assert f"4 sync points {where} rotated-hybrid" in text
            assert len(handle.stats()["sync_points"]) == (0 if stage.is_last else 4)
        assert str(handle) == "low-bit communication: removed"

    def test_what_goes_wrong_on_one_stage_is_said_on_both(self, stage):
        differ = refusal(stage.chunks, stage.index, bits=3 if dist.get_rank() == 3 else 4)
        assert re.search(r"ranks differ in their codec.*\(4 bits\).*\(3 bits\)", differ)
        assert "(found by rank 2)" in differ
        none = torch.nn.Identity()
        assert "Identity has no Megatron-core transformer layer" in refusal(none, stage.index)
        given = none if stage.is_last else stage.chunks
        assert refusal(given, stage.index) == "no error", "an empty stage"
