"""Checks of `apply` inside a real GPTModel of megatron-core; run by test_core.py in forked ranks.

One process group does all the work (importing megatron.core takes 7-9 s a process) and rank by rank
writes what it saw to OUT/rankN.pt; the assertions are in test_core.py.
"""

import argparse
import inspect
import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from megatron_lowbit.calibration.index_files import read_index, write_index
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.cpu.device import enable_cpu

LAYERS, HIDDEN, HEADS, VOCAB, LENGTH = 2, 96, 6, 120, 24
CODECS = [("bf16", None), ("static-hybrid", None), ("rotated-hybrid", None), ("rotated-hybrid", 2)]
# Codec, bits, collective: the others are one-shot.
COLLECTIVES = [
    ("static-hybrid", (4, 6), "two-shot"),
    ("rotated-hybrid", (4, 4), "two-shot"),
    ("rotated-hybrid", (4, 6), "two-shot"),
    ("rotated-hybrid", (4, 4), "native"),
    ("rotated-hybrid", (4, 4), "auto"),
]


MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 96,
    "moe_shared_expert_intermediate_size": 96,
    "moe_token_dispatcher_type": "allgather",
}


class RMSNorm(torch.nn.RMSNorm):
    """Megatron's torch norms refuse sequence parallelism, which asks nothing of a norm here."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps)


def layer_spec(config: dict):
    """The local spec, with norms that take sequence parallelism where it is asked for."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    spec = get_gpt_layer_local_spec(config.get("num_moe_experts"), normalization="RMSNorm")
    if not config.get("sequence_parallel"):
        return spec
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * LAYERS, layer_norm=RMSNorm)


def seed_all(seed: int) -> None:
    """Torch's generator and Megatron's, which 0.13 has no way to make anew: it is emptied."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    reset = {"force_reset_rng": True}
    if "force_reset_rng" not in inspect.signature(model_parallel_cuda_manual_seed).parameters:
        reset = {}
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, **reset)
    torch.manual_seed(seed)


def build(
    dtype: torch.dtype, *, seed: int = 1, bias: bool = False, place: dict | None = None, **config
):
    """A small GPTModel of the local spec, with the same weights at any TP degree.

    `place` is what GPTModel takes to be a stage of a pipeline.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    seed_all(seed)
    fields = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS}
    transformer = TransformerConfig(
        **{**fields, **config},
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        add_bias_linear=bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        normalization="RMSNorm",
        masked_softmax_fusion=False,
    )
    model = GPTModel(
        transformer,
        layer_spec(config),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        **(place or {}),
    )
    with torch.no_grad():  # norms and biases as a trained model has them: not all one or zero
        for name, parameter in model.named_parameters():
            if "norm" in name or (name.endswith("bias") and "linear_proj" in name):
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.to(dtype).eval()


def whole_logits(model) -> torch.Tensor:
    """Logits of the whole vocabulary for fixed tokens."""
    from megatron_lowbit.model.forward import logits

    tokens = torch.arange(LENGTH) * 7 % VOCAB
    return whole_vocabulary(logits(model, tokens[None])[0])


def whole_vocabulary(mine: torch.Tensor) -> torch.Tensor:
    """The parts of all tensor-parallel ranks side by side, ``[tokens, vocabulary]``."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def fp32_accumulation(model) -> torch.Tensor:
    """Logits with Megatron's partials summed in fp32 instead of the model's dtype."""
    from megatron_lowbit.integration.sums.sync_points import Attachment, find_sync_points

    def reduce(partial, scatter):
        total = partial.float()
        dist.all_reduce(total, group=group)
        total = total.to(partial.dtype)
        return total.chunk(group.size())[group.rank()] if scatter else total

    points, _ = find_sync_points(model)
    group = points[0].group
    attachment = Attachment(points, [reduce] * len(points))
    result = whole_logits(model)
    attachment.remove()
    return result


def make_index(model, out: Path, simulate_tp: int | None = None):
    """Calibrate on random tokens, by the same function as tools/calibrate.py."""
    from megatron_lowbit.integration.loops.calibrate_checkpoint import calibrate_model

    sequences = torch.randint(0, VOCAB, (5, LENGTH), generator=torch.Generator().manual_seed(0))
    index, progress = calibrate_model(
        model,
        sequences,
        codec=get_codec("rotated-hybrid"),
        bf16_features=2,
        corpus={"sha256": "0"},
        partial=out / "partial",
        simulate_tp=simulate_tp,
    )
    if dist.get_rank() == 0:
        write_index(index, out / "lowbit")
    dist.barrier()
    return index, progress


def count_native_calls(model) -> int:
    """How often one forward pass calls the all-reduce that RowParallelLinear imports by value."""
    from megatron.core.tensor_parallel import layers

    original, calls = layers.reduce_from_tensor_model_parallel_region, []

    def counting(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    layers.reduce_from_tensor_model_parallel_region = counting
    whole_logits(model)
    layers.reduce_from_tensor_model_parallel_region = original
    return len(calls)


def run_codecs(model, out: Path) -> dict:
    """Logits, status and traffic of each codec, and what is left after each."""
    import megatron_lowbit

    results = {"native": whole_logits(model), "native_calls": count_native_calls(model)}
    state = {key: value for key, value in model.state_dict().items() if value is not None}
    for name, bits in CODECS:
        handle = megatron_lowbit.apply(
            model, out / "lowbit", codec=name, bits=bits, collective="one-shot"
        )
        first = whole_logits(model)
        results[name, bits] = {
            "logits": first,
            "again": whole_logits(model),
            "calls": count_native_calls(model),
            "status": [(s.layer, s.name, str(s.codec), s.bf16_features) for s in handle.status()],
            "traffic": [s.traffic for s in handle.status()],
            "symmetric_memory": {s.symmetric_memory for s in handle.status()},
            "text": str(handle),
        }
        handle.remove()
        handle.remove()
        after = {key: value for key, value in model.state_dict().items() if value is not None}
        results[name, bits]["restored"] = (
            torch.equal(whole_logits(model), results["native"])
            and list(after) == list(state)
            and all(
                value is state[key] or torch.equal(value, state[key])
                for key, value in after.items()
            )
        )
    return results


def run_collectives(model, out: Path) -> dict:
    """Logits, statistics and start-up line by collective."""
    import megatron_lowbit

    results = {}
    for name, bits, mode in COLLECTIVES:
        handle = megatron_lowbit.apply(
            model, out / "lowbit", codec=name, bits=bits, collective=mode
        )
        results[name, bits, mode] = {
            "logits": whole_logits(model),
            "stats": handle.stats(),
            "text": str(handle),
            "retuned": _retuned(handle),
        }
        handle.remove()
    return results


def _retuned(handle) -> str:
    """What the sync points go by after `retune`, or why that cannot be."""
    from megatron_lowbit.errors import LowbitError

    try:
        handle.retune()
    except LowbitError as error:
        return str(error)
    (way,) = {point.collective for point in handle.status()}
    return way


def sequence_parallel(out: Path) -> dict:
    """A model with sequence parallelism: reduce-scatters at its sync points, and all-gathers."""
    import megatron_lowbit

    if dist.get_world_size() == 1:
        return {}
    model = build(torch.bfloat16, sequence_parallel=True)
    index, _ = make_index(model, out)
    result = {"native": whole_logits(model), "exact": fp32_accumulation(model)}
    for name, gather in (("bf16", None), ("rotated-hybrid", None), ("rotated-hybrid", 6)):
        handle = megatron_lowbit.apply(
            model, index, codec=name, collective="two-shot", all_gather_bits=gather
        )
        result[name, gather] = whole_logits(model)
        result["stats", name, gather] = handle.stats()
        handle.remove()
    result["restored"] = torch.equal(whole_logits(model), result["native"])
    handle = megatron_lowbit.apply(model, index, collective="one-shot", all_gather_bits=6)
    switched = [m for m in model.modules() if getattr(m, "sequence_parallel", False) is True]
    for module in switched:  # as inference engines do for the steps of decoding
        module.sequence_parallel = False
    model.embedding.scatter_to_sequence_parallel = False
    model.embedding.reduce_scatter_embeddings = False
    model.embedding.word_embeddings.reduce_scatter_embeddings = False
    model.config.sequence_parallel = False
    result["switched"] = whole_logits(model)
    result["switched_stats"] = handle.stats()
    handle.remove()
    return result


def planning(out: Path) -> dict:
    """What options are predicted to cost, and what some of them do; in fp32, free of rounding."""
    from megatron_lowbit.calibration.costs import option_costs
    from megatron_lowbit.calibration.costs.option_costs import measure_options
    from megatron_lowbit.calibration.plan import plan, predicted_divergence, with_feedback
    from megatron_lowbit.calibration.planning import Planner
    from megatron_lowbit.calibration.recipe import Assignment
    from megatron_lowbit.integration.sums.simulate import find_summing
    from megatron_lowbit.model.forward import logits
    from megatron_lowbit.model.language_model import LanguageModel

    if dist.get_world_size() == 1:
        return {}
    sequences = torch.randint(0, VOCAB, (12, LENGTH), generator=torch.Generator().manual_seed(5))
    result = {}
    for sequence_parallel in (False, True):
        model = build(torch.float32, sequence_parallel=sequence_parallel).eval()
        index, _ = make_index(model, out / str(sequence_parallel))
        summing, _ = find_summing(model, None)
        groups = {"vocab_size": VOCAB, "dp_group": dist.new_group([dist.get_rank()])}
        options = measure_options(model, summing, index, sequences, **groups, track=lambda *_: iter)
        result["options", sequence_parallel] = options
        language_model = LanguageModel(
            logits=lambda tokens, model=model: logits(model, tokens),
            vocab_size=VOCAB,
            max_length=LENGTH,
            tp_group=summing.points[0].group,
            tokenize=list,
            detokenize=str,
        )
        planner = Planner(index, language_model, summing, sequences, options, groups["dp_group"])
        carrying = replace(planner, options=with_feedback(options), feedback=True)
        for bits in (3, 4, 5):
            recipe = dict.fromkeys(options, Assignment("shaped-hybrid", bits, 0))
            for kind, one in (("divergence", planner), ("carried", carrying)):
                predicted = predicted_divergence(one.options, recipe, one.following)
                result[kind, sequence_parallel, bits] = predicted, one.measure(recipe)
        with mock.patch.object(option_costs, "why_no_gradients", lambda *_, **__: "a test"):
            slow = measure_options(
                model, summing, index, sequences, **groups, track=lambda *_: iter
            )
        result["forward", sequence_parallel] = slow
        for name, found in (("gradients", options), ("divergence", slow)):
            recipe = plan(with_feedback(found), 3.0, following=carrying.following)
            result["plan by", name, sequence_parallel] = carrying.measure(recipe)
    target = 2 * result["divergence", True, 4][1]
    result["target"] = target, *planner.for_target(target)
    return result


def variant_model(out: Path, **config) -> dict:
    """Another kind of model: its sync points, what stays native, and how it runs with codecs."""
    import megatron_lowbit

    model = build(torch.bfloat16, **config)
    index, _ = make_index(model, out)
    result = {"native_logits": whole_logits(model), "exact": fp32_accumulation(model)}
    for codec in ("bf16", "rotated-hybrid"):
        handle = megatron_lowbit.apply(model, index, codec=codec, collective="one-shot")
        result[codec] = whole_logits(model)
        result["points"] = [(status.layer, status.name) for status in handle.status()]
        result["native"], result["text"] = handle.native, str(handle)
        handle.remove()
    result["restored"] = torch.equal(whole_logits(model), result["native_logits"])
    return result


def simulated(out: Path) -> dict:
    """The model whole, as 3 tensor-parallel ranks in each process; run it last.

    The processes are data parallel then: they share the calibration.
    """
    from megatron.core import parallel_state

    from megatron_lowbit.integration.sums.simulate import find_summing
    from megatron_lowbit.model.forward import logits

    if dist.get_world_size() == 1:
        return {}
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(1)
    model, index = build(torch.bfloat16), read_index(out / "lowbit")
    try:
        find_summing(model, 5)
        result = {"divide": "no error"}
    except LowbitError as error:
        result = {"divide": str(error)}
    summing, _ = find_summing(model, 3)
    tokens = (torch.arange(LENGTH) * 7 % VOCAB)[None]
    result["native"] = logits(model, tokens)[0]
    for name, bits, mode in [*((n, b, "one-shot") for n, b in CODECS), *COLLECTIVES[:3]]:
        codec = get_codec(name, bits=bits)
        tables = [
            index.tables(point.layer, point.name, codec, ranks=summing.ranks)
            for point in summing.points
        ]
        # As `apply` does by default.
        feedback = codec.carries
        codecs = [codec] * len(tables)
        reducers = summing.reducers(codecs, tables, mode, feedback=feedback)
        with summing.using(reducers):
            got = logits(model, tokens)[0]
        traffic = [reducer.traffic.total() for reducer in reducers]
        result[name, bits, mode] = {"logits": got, "traffic": traffic}
    result["after"] = logits(model, tokens)[0]
    result["index"], _ = make_index(build(torch.bfloat16), out / "simulated", simulate_tp=3)
    return result


def message(step) -> str:
    """The user's error that `step` raises."""
    try:
        step()
    except LowbitError as error:
        return str(error)
    return "no error"


def gradients(model, out: Path) -> dict:
    """Weight gradients with and without the low-bit path."""
    import megatron_lowbit

    tokens = (torch.arange(LENGTH) % VOCAB)[None]
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    result = {}
    for codec in (None, "bf16", "rotated-hybrid"):
        handle = codec and megatron_lowbit.apply(
            model, out / "lowbit", codec=codec, collective="one-shot"
        )
        model.zero_grad()
        model(tokens, torch.arange(LENGTH)[None], mask).float().square().mean().backward()
        result[codec] = model.decoder.layers[0].mlp.linear_fc1.weight.grad.clone()
        if handle:
            handle.remove()
    return result


def not_finite(out: Path) -> str:
    """What calibration says of a model with a NaN in one weight."""
    model = build(torch.bfloat16)
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight[0, 0] = torch.nan
    try:
        make_index(model, out)
        return "no error"
    except LowbitError as error:
        return str(error)


def errors(model, index, out: Path) -> dict[str, str]:
    """Messages of everything that must be refused, none of which may change the model."""
    import dataclasses

    import megatron_lowbit
    from megatron_lowbit.comm.policy.policy import Settings
    from megatron_lowbit.integration.sums.sync_points import find_sync_points
    from megatron_lowbit.kernels import switches

    def changed(**changes):
        return dataclasses.replace(index, manifest={**index.manifest, **changes})

    def apply(*args, **kwargs):
        return lambda: megatron_lowbit.apply(model, *args, **kwargs)

    found = {
        "none": message(apply(out / "no-such-index")),
        "codec": message(apply(index, codec="mp3")),
        "bits": message(apply(index, bits=7)),
        "tp": message(apply(changed(tp_size=2), codec="static-hybrid")),
        "tp_rotated": message(lambda: apply(changed(tp_size=2))().remove()),
        "disagree": message(apply(index, bits=3 if dist.get_rank() == 0 else 2)),
        "one_rank": message(apply(out / "lowbit" if dist.get_rank() else out / "none")),
    }
    for key in ("num_layers", "hidden_size", "ffn_hidden_size"):
        wrong = {**index.manifest["model"], key: 7}
        found[key] = message(apply(changed(model=wrong)))
    point = find_sync_points(model)[0][1]
    for name, attribute, value in (
        ("skip_bias_add", "skip_bias_add", False),
        ("muted", "explicit_expert_comm", True),
    ):
        before = getattr(point.module, attribute)
        setattr(point.module, attribute, value)
        found[name] = message(lambda: found.update(muted_list=find_sync_points(model)[1]))
        setattr(point.module, attribute, before)
    handle = megatron_lowbit.apply(model, index)
    found["twice"] = message(apply(index))
    handle.remove()
    found["gather"] = message(apply(index, all_gather_bits=6))
    found["mode"] = message(apply(index, collective="ring"))
    found["modes"] = message(apply(index, collective="one-shot" if dist.get_rank() else "native"))
    found["sum_bits"] = message(apply(index, bits=(4, 6) if dist.get_rank() else (4, 4)))
    found["tuning"] = message(apply(index, collective=Settings(tuning=out / "none.json")))
    with switches.rotating_by(switches.ROTATIONS[dist.get_rank() % 2]):
        found["rotations"] = message(apply(index))
    one_asks = {switches.ROTATION_SWITCH: "wings"} if dist.get_rank() == 1 else {}
    with switches.rotating_by(None), mock.patch.dict(os.environ, one_asks):
        found["rotation"] = message(apply(index))
    rules = out / f"rules{dist.get_rank()}.json"
    rules.write_text('[{"match": "9.*", "bits": 3}]')
    found["rule"] = message(apply(index, recipe=rules))
    rules.write_text('[{"match": "*", "codec": "native"}]')
    found["all_native"] = message(apply(index, recipe=rules))
    rules.write_text(f'[{{"match": "1.mlp.*", "bits": {2 + dist.get_rank() % 2}}}]')
    found["rules_differ"] = message(apply(index, recipe=rules))
    original = type(point.module)
    point.module.__class__ = type("TERowParallelLinear", (torch.nn.Module,), {})
    found["te"] = message(apply(index))
    point.module.__class__ = original
    found["not_megatron"] = message(lambda: megatron_lowbit.apply(torch.nn.Linear(2, 2), index))
    return found


def with_rules(model, index, out: Path) -> dict:
    """A codec of its own for some sync points, one of them native."""
    import megatron_lowbit

    rules = out / f"rules{dist.get_rank()}.json"
    rules.write_text(
        '[{"match": "1.mlp.*", "codec": "native"}, {"match": "1.*", "bits": [3, 6]},'
        ' {"match": "2.mlp.*", "codec": "shaped-hybrid", "bits": 6, "bf16_features": 3}]'
    )
    handle = megatron_lowbit.apply(model, index, recipe=rules, collective="two-shot")
    result = {"text": str(handle), "native": handle.native, "logits": whole_logits(model)}
    result["status"] = [
        (p.layer, p.name, repr(p.codec), p.bf16_features, p.traffic.calls) for p in handle.status()
    ]
    handle.remove()
    return result


def folding(model, index) -> dict:
    """Rotations folded into the weights: logits, what is saved, what is left, what is refused."""
    from megatron.core import parallel_state

    import megatron_lowbit

    def fold(**wishes):
        return megatron_lowbit.apply(
            model, index, **{"collective": "one-shot", **wishes}, fold=True
        )

    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    layer = model.decoder.layers[0].mlp
    linear, weight = layer.linear_fc2, layer.linear_fc2.weight
    before, native = weight.detach().clone(), whole_logits(model)
    result = {
        "one_rank" if dist.get_world_size() == 1 else "auto": message(
            lambda: fold(collective="auto") if dist.get_world_size() > 1 else fold()
        )
    }
    if dist.get_world_size() == 1:
        return result
    # Folded weights carry no errors.
    handle = megatron_lowbit.apply(model, index, collective="one-shot", feedback=False)
    result["plain"] = whole_logits(model)
    handle.remove()
    for mode in ("one-shot", "two-shot"):
        handle = fold(collective=mode)
        result[mode] = whole_logits(model)
        result["text"], result["stats"] = str(handle), handle.stats()
        result["rows"], result["same_parameter"] = len(weight), linear.weight is weight
        saved = model.state_dict()["decoder.layers.0.mlp.linear_fc2.weight"]
        sharded = linear.sharded_state_dict(prefix="x.", metadata=groups)["x.weight"].data
        result["saved"] = torch.equal(saved, before) and torch.equal(sharded, before)
        result["load"] = message(lambda: model.load_state_dict(model.state_dict()))
        handle.remove()
        handle.remove()
        result["restored"] = torch.equal(weight, before) and torch.equal(
            whole_logits(model), native
        )
        result["loads"] = str(model.load_state_dict(model.state_dict()))
    result["static"] = message(lambda: fold(codec="static-hybrid"))
    layer.other = torch.nn.Linear(1, 1)
    layer.other.weight = weight
    result["shared"] = message(fold)
    del layer.other
    weight.data = before.to(torch.float8_e4m3fn)
    result["quantized"] = message(fold)
    weight.data = before
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    enable_cpu()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    import megatron.core
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 forgets it where Transformer Engine is missing
    parallel_state.initialize_model_parallel(dist.get_world_size())
    model = build(torch.bfloat16)
    index, progress = make_index(model, out)
    read = read_index(out / "lowbit")
    other = build(torch.bfloat16, seed=2)
    results = {
        "version": megatron.core.__version__,
        "index": {(n, name): r for n, layer in read.layers.items() for name, r in layer.items()},
        "manifest": read.manifest,
        "progress": progress,
        "codecs": run_codecs(model, out),
        "rules": with_rules(model, index, out),
        "folding": folding(model, index),
        "planning": planning(out / "planning"),
        "collectives": run_collectives(model, out),
        "sequence_parallel": sequence_parallel(out / "sp"),
        "fp32_accumulation": fp32_accumulation(model),
        "gradients": gradients(model, out),
        "bias": variant_model(out / "bias", bias=True),
        "moe": variant_model(out / "moe", **MOE),
        "not_finite": not_finite(out / "nan"),
        "errors": errors(model, index, out) if dist.get_world_size() > 1 else {},
        "after_errors": whole_logits(model),
    }
    try:
        import megatron_lowbit

        megatron_lowbit.apply(other, index)
        results["other_weights"] = "no error"
    except LowbitError as error:
        results["other_weights"] = str(error)
    results["simulated"] = simulated(out)
    torch.save(results, out / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
