"""A model whose sequence or whose layers are split over ranks: CP 2 x TP 2, PP 2 x TP 2."""

import pytest
import torch
import torch.distributed as dist
from layer_models import ATTENTION, MLP, CausalAttention, gpt, my_share, whole_sequence
from on_ranks import directory_of_all
from releases import NEWEST
from small_gpt import LENGTH, VOCAB, low, make_index, start_megatron, whole_vocabulary

from megatron_lowbit.benchmark.codecs.closeness import sqnr

pytestmark = pytest.mark.on_ranks(4)
TOKENS, PLACES = torch.arange(LENGTH) * 7 % VOCAB, torch.arange(LENGTH)


@torch.inference_mode()
def over_contexts(model) -> torch.Tensor:
    """Logits of the whole sequence."""
    from megatron.core import parallel_state

    group = parallel_state.get_context_parallel_group()
    mine, places = my_share(TOKENS, group), my_share(PLACES, group)
    return whole_sequence(whole_vocabulary(model(mine[None], places[None], None)[0]), group)


def test_with_context_parallelism_each_rank_sends_its_own_tokens():
    """Over its tensor-parallel group alone."""

    def sent() -> tuple[torch.Tensor, torch.Tensor, list[int], str]:
        model = gpt(attention=CausalAttention)
        native = over_contexts(model)
        with low(model, index) as handle:
            got = over_contexts(model)
            points = handle.stats()["sync_points"]
            return native, got, [p["choices"][0]["tokens"] for p in points], str(handle)

    start_megatron(NEWEST, 2)
    index, _ = make_index(gpt(attention=CausalAttention), directory_of_all("contexts"))
    native, got, tokens, _ = sent()
    start_megatron(NEWEST, 2, context_parallel_size=2)
    native_split, got_split, tokens_split, text = sent()
    assert sqnr(native, native_split) > 40
    assert sqnr(got, got_split) > 40
    assert 8 < sqnr(native, got) < 40
    assert "one-shot over 2 ranks" in text
    assert tokens == [LENGTH] * 4
    assert tokens_split == [LENGTH / 2] * 4


def interleaved(weights: dict[str, torch.Tensor]) -> list[torch.nn.Module]:
    """This stage's two chunks of the model that has `weights`: layers 1, 2 | 3, 4 by stage."""
    from megatron.core import parallel_state

    stage, chunks = parallel_state.get_pipeline_model_parallel_rank(), []
    for virtual in (0, 1):
        layer = 2 * virtual + stage  # counted from 0
        place = {"pre_process": layer == 0, "post_process": layer == 3, "vp_stage": virtual}
        chunk = gpt(num_layers=4, virtual_pipeline_model_parallel_size=2, place=place)
        mine = {
            name: weights[name.replace("decoder.layers.0.", f"decoder.layers.{layer}.")]
            for name, value in chunk.state_dict().items()
            if value is not None
        }
        chunk.load_state_dict(mine, strict=False)
        chunks.append(chunk)
    return chunks


@torch.inference_mode()
def through_stages(chunks: list[torch.nn.Module]) -> torch.Tensor:
    """Logits of a model, or of the chunks of it that the stages have, one after the other."""
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    mask, hidden = (PLACES[:, None] < PLACES)[None, None], None
    for step in range(group.size() * len(chunks)):
        chunk, owner = chunks[step // group.size()], step % group.size()
        if owner == group.rank():
            chunk.set_input_tensor(hidden)
            hidden = chunk(TOKENS[None], PLACES[None], mask)
        shared = [hidden]
        source = dist.get_process_group_ranks(group)[owner]
        dist.broadcast_object_list(shared, src=source, group=group)
        hidden = shared[0]
    return whole_vocabulary(hidden[0])


def test_an_interleaved_pipeline_gives_the_bits_of_the_whole_model():
    """Two chunks a stage: layers are numbered over all stages."""

    def ran(chunks) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, str]]]:
        native = through_stages(chunks)
        # Carried errors end with a chunk: test_matrix.py shows where.
        with low(chunks, index, feedback=False) as handle:
            got = through_stages(chunks)
            points = [(point.layer, point.name) for point in handle.status()]
        assert torch.equal(through_stages(chunks), native)
        return native, got, points

    start_megatron(NEWEST, 2)
    model = gpt(num_layers=4)
    index, _ = make_index(model, directory_of_all("stages"))
    weights = {name: value for name, value in model.state_dict().items() if value is not None}
    native, got, _ = ran([model])
    layouts = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    start_megatron(NEWEST, 2, **layouts)
    native_split, got_split, points = ran(interleaved(weights))
    stage = dist.get_rank() // 2
    assert points == [(n, name) for n in (1 + stage, 3 + stage) for name in (ATTENTION, MLP)]
    assert torch.equal(native_split, native)
    assert torch.equal(got_split, got)
    assert 8 < sqnr(native, got) < 40
