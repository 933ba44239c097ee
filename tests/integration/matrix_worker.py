"""What the support matrix says of one megatron-core release, each row by running it.

Run by test_matrix.py. Megatron is imported once (that takes 7-9 s) and 4 processes are forked from
there: tensor parallel 2 x data parallel 2, then tensor parallel 2 x pipeline parallel 2. Rank by
rank they write what they saw, or the error that ended a row, to OUT/rankN.pt.
"""

import argparse
import json
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_gpt import (
    LENGTH,
    MOE,
    VOCAB,
    build,
    count_native_calls,
    fp32_accumulation,
    make_index,
    whole_logits,
    whole_vocabulary,
)

import megatron_lowbit
from megatron_lowbit.calibration.recipe import Assignment
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.cpu.device import enable_cpu
from megatron_lowbit.integration.sums.over_ranks import OverRanks
from megatron_lowbit.integration.sums.sync_points import find_sync_points

RANKS, LAYERS = 4, 4
CODECS = ("bf16", "rotated-hybrid")


def with_codecs(model, index, collective: str = "one-shot", **options) -> dict:
    """Logits natively, with fp32 sums and by codec, and what is left afterwards."""
    result = {"native": whole_logits(model), "exact": fp32_accumulation(model)}
    result["native_calls"] = count_native_calls(model)
    for codec in CODECS:
        handle = megatron_lowbit.apply(model, index, codec=codec, collective=collective, **options)
        result[codec] = whole_logits(model)
        result["calls"] = count_native_calls(model)
        result["points"] = [(status.layer, status.name) for status in handle.status()]
        result["collectives"] = {choice["collective"] for choice in handle.stats()["total"]}
        result["text"] = str(handle)
        handle.remove()
    result["restored"] = torch.equal(whole_logits(model), result["native"])
    return result


def local_spec(out: Path) -> dict:
    """Dense layers; the index is calibrated here, too."""
    model = build(torch.bfloat16)
    index, progress = make_index(model, out)
    return with_codecs(model, index) | {"progress": progress}


def sequence_parallel(out: Path) -> dict:
    """Reduce-scatters at the sync points."""
    model = build(torch.bfloat16, sequence_parallel=True)
    return with_codecs(model, make_index(model, out)[0])


def all_gathers(out: Path) -> dict:
    """With sequence parallelism, the all-gathers in 6 bits as well."""
    model = build(torch.bfloat16, sequence_parallel=True)
    return with_codecs(model, make_index(model, out)[0], all_gather_bits=6)


def experts(out: Path) -> dict:
    """Mixture of experts: a shared expert is a sync point, routed ones stay native."""
    model = build(torch.bfloat16, **MOE)
    return with_codecs(model, make_index(model, out)[0])


def pipeline(out: Path) -> dict:
    """Stages of 2 layers."""
    return staged(out, virtual=None)


def interleaved(out: Path) -> dict:
    """Chunks of one layer, two on each stage."""
    return staged(out, virtual=2)


def staged(out: Path, virtual: int | None) -> dict:
    """The same model without a pipeline and over 2 stages, by the index of the former."""
    from megatron.core import parallel_state

    whole = build(torch.bfloat16, num_layers=LAYERS)
    index, _ = make_index(whole, out)
    # Errors that are carried end with a chunk: without them the split is not seen in the bits.
    result = {"whole": with_codecs(whole, index, feedback=False)}
    result["whole"]["carried"] = carried_by_chunk(whole, index, virtual or 1)
    handle = megatron_lowbit.apply(whole, index, collective="one-shot", fold=True)
    result["whole"]["folded"] = whole_logits(whole)
    handle.remove()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(2, 2, virtual_pipeline_model_parallel_size=virtual)
    chunks = build_chunks(virtual or 1, whole)
    result["native"] = run_schedule(chunks)
    for codec in CODECS:
        handle = megatron_lowbit.apply(
            chunks, index, codec=codec, collective="one-shot", feedback=False
        )
        result[codec] = run_schedule(chunks)
        result["points"] = [(status.layer, status.name) for status in handle.status()]
        result["text"] = str(handle)
        handle.remove()
    handle = megatron_lowbit.apply(chunks, index, collective="one-shot", fold=True)
    result["folded"] = run_schedule(chunks)
    handle.remove()
    result |= carried(chunks, index)
    result["half"] = half_native(chunks, index, out)
    result["refused"] = refused_on_one_stage(chunks, index)
    result["after"] = run_schedule(chunks)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(2)
    return result


def shaped(index):
    """The index, for the codec whose chains get more bits at their ends."""
    codec = {"name": "shaped-hybrid", "bits": 4, "bf16_features": 2}
    return replace(index, manifest={**index.manifest, "codec": codec})


def carried_by_chunk(whole, index, chunks: int) -> torch.Tensor:
    """Logits of the whole model whose chain is cut where the pipeline's chunks end."""
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
        return whole_logits(whole)


def carried(chunks: list, index) -> dict:
    """The same by `apply`, over the stages."""
    handle = megatron_lowbit.apply(chunks, shaped(index), collective="one-shot")
    result = {"carried": run_schedule(chunks), "bits": [s.codec.bits for s in handle.status()]}
    result |= {"feedback": handle.feedback(), "carrying text": str(handle)}
    handle.remove()
    return result


def half_native(chunks: list, index, out: Path) -> dict:
    """Every layer of the last stage left native by a rule."""
    from megatron.core import parallel_state

    last = [layer for layer in range(1, LAYERS + 1) if layer not in layers_of(chunks)]
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        last = sorted(layers_of(chunks))
    rules = out / f"rules{dist.get_rank()}.json"
    rules.write_text(json.dumps([{"match": f"{n}.*", "codec": "native"} for n in last]))
    handle = megatron_lowbit.apply(chunks, index, recipe=rules, collective="one-shot", fold=True)
    result = {"text": str(handle), "logits": run_schedule(chunks)}
    result["stats"] = len(handle.stats()["sync_points"])
    handle.remove()
    result["removed"] = str(handle)
    return result


def layers_of(chunks: list) -> set[int]:
    """Numbers of the layers that these chunks hold."""
    return {layer.layer_number for chunk in chunks for layer in chunk.decoder.layers}


def refused_on_one_stage(chunks: list, index) -> dict[str, str]:
    """What every rank hears where only the last stage's ranks cannot agree, or have no layer."""
    rank, none = dist.get_rank(), torch.nn.Identity()
    some = none if rank > 1 else chunks
    return {
        "bits": refusal(lambda: megatron_lowbit.apply(chunks, index, bits=3 if rank == 3 else 4)),
        "none": refusal(lambda: megatron_lowbit.apply(none, index)),
        "empty stage": refusal(lambda: megatron_lowbit.apply(some, index).remove()),
    }


def refusal(step) -> str:
    """The message of what must be refused."""
    try:
        step()
    except LowbitError as error:
        return str(error)
    return "no error"


def doctored(out: Path) -> dict:
    """What is said where a release lacks what is relied on, and whether the model was touched."""
    from megatron.core.tensor_parallel import layers, mappings
    from megatron.core.transformer import transformer_layer

    model = build(torch.bfloat16)
    index, _ = make_index(model, out)
    native, result = whole_logits(model), {}
    linear, function = layers.RowParallelLinear, "reduce_from_tensor_model_parallel_region"
    forward = linear.forward
    for name, owner, attribute, value in (
        ("forward", linear, "forward", lambda self, x: forward(self, x)),
        ("class", transformer_layer, "BaseTransformerLayer", None),
        ("function", mappings, function, lambda x: x),
    ):
        original = getattr(owner, attribute)
        if value is None:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, value)
        result["apply", name] = refusal(lambda: megatron_lowbit.apply(model, index).remove())
        result["calibrate", name] = refusal(lambda: make_index(model, out))
        setattr(owner, attribute, original)
    return {**result, "untouched": torch.equal(whole_logits(model), native)}


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


ROWS = {
    "local spec": local_spec,
    "sequence parallel": sequence_parallel,
    "all-gather in low bits": all_gathers,
    "MoE": experts,
    "pipeline": pipeline,
    "interleaved pipeline": interleaved,
    "doctored": doctored,
}


def run_rank(rank: int, out: Path) -> None:
    """All rows, each by itself: one that fails on every rank leaves the others alone."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(out / "store"), RANKS)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    import megatron.core
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(2)
    results = {"version": megatron.core.__version__}
    for name, row in ROWS.items():
        (out / name).mkdir(exist_ok=True)
        try:
            results[name] = row(out / name)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    torch.save(results, out / f"rank{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    enable_cpu()
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.pipeline_parallel.schedules  # noqa: F401
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 forgets it where Transformer Engine is missing
    mp.start_processes(run_rank, (out,), nprocs=RANKS, start_method="fork")


if __name__ == "__main__":
    main()
