"""A small GPTModel over two pipeline stages, and the chains of its chunks in the whole model."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from small_gpt import LENGTH, VOCAB, build, whole_vocabulary

from megatron_lowbit.calibration.recipe import Assignment
from megatron_lowbit.integration.sums.over_ranks import OverRanks
from megatron_lowbit.integration.sums.sync_points import find_sync_points

LAYERS = 4


def build_chunks(count: int, whole) -> list:
    """This rank's chunks of a pipeline, with the weights of `whole`."""
    from megatron.core import parallel_state

    stages = parallel_state.get_pipeline_model_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    config = {"num_layers": LAYERS, "pipeline_model_parallel_size": stages}
    if count > 1:
        config["virtual_pipeline_model_parallel_size"] = count
    chunks = []
    for number in range(count):
        place = {"vp_stage": number if count > 1 else None}
        place["pre_process"] = (number, stage) == (0, 0)
        place["post_process"] = (number, stage) == (count - 1, stages - 1)
        chunks.append(build(torch.bfloat16, place=place, **config))
        copy_weights(whole, chunks[-1])
    return chunks


def copy_weights(whole, chunk) -> None:
    """Those of `whole` that `chunk` has, layers by their number over all stages."""
    numbers = {layer.layer_number: n for n, layer in enumerate(whole.decoder.layers)}
    source, renamed = dict(whole.named_parameters()), {}
    for n, layer in enumerate(chunk.decoder.layers):
        renamed[f"decoder.layers.{n}."] = f"decoder.layers.{numbers[layer.layer_number]}."
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            prefix = next((p for p in renamed if name.startswith(p)), "")
            parameter.copy_(source[renamed.get(prefix, "") + name.removeprefix(prefix)])


@torch.inference_mode()
def run_schedule(chunks: list) -> list[torch.Tensor]:
    """Logits of 2 micro-batches by Megatron's own schedule, on the last stage; [] elsewhere."""
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    tokens = (torch.arange(LENGTH) * 7 % VOCAB)[None]

    def step(data, model):
        logits = model(next(data), torch.arange(LENGTH)[None], mask)
        return logits, lambda output, non_loss_data: output.clone()

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter([tokens, tokens.flip(1)]) for _ in chunks],
        model=chunks,
        num_microbatches=2,
        seq_length=LENGTH,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return [whole_vocabulary(output[0]) for output in outputs]


def shaped(index):
    """The index, for the codec whose chains get more bits at their ends."""
    codec = {"name": "shaped-hybrid", "bits": 4, "bf16_features": 2}
    return replace(index, manifest={**index.manifest, "codec": codec})


@contextlib.contextmanager
def with_chunks(whole, index, chunks: int) -> Iterator[None]:
    """The whole model in low bits, its chain cut where chunks of two stages end."""
    points, codecs, tables = find_sync_points(whole)[0], [], []
    layers = LAYERS // (2 * chunks)
    points = [replace(point, chunk=(point.layer - 1) // layers) for point in points]
    for point, following in zip(points, [*points[1:], None], strict=True):
        is_end = following is None or following.chunk != point.chunk
        assignment = Assignment("shaped-hybrid", 6 if is_end else 4)
        codecs.append(assignment.make())
        tables.append(shaped(index).tables_at(point, assignment, 2))
    summing = OverRanks(points)
    with summing.using(summing.reducers(codecs, tables, "one-shot", feedback=True)):
        yield
