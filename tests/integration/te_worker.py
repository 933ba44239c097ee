"""Checks of Transformer Engine's layers in a real GPTModel; run by test_transformer_engine.py.

`transformer_engine` is the stand-in of te_stand_in/; all of Megatron's classes are megatron-core's
own. One process group of two ranks does all the work (importing megatron.core takes 7-9 s a
process) and rank by rank writes what it saw to OUT/rankN.pt.
"""

import argparse
import inspect
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from small_gpt import HIDDEN, LAYERS, LENGTH, VOCAB, build, make_index, message, whole_logits

from megatron_lowbit.integration.cpu.device import enable_cpu

FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
COLLECTIVES = ("allreduce", "reduce_scatter_along_first_dim")


def same_weights(local, spec, **config):
    """A model of another spec with the weights of a local one."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    for name, value in config.items():
        setattr(local.config, name, value)
    model = GPTModel(
        local.config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
    )
    state = {}
    for name, value in local.state_dict().items():
        for theirs, fused in FUSED_NORMS.items():
            name = name.replace(theirs, fused)
        state[name] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("_extra_state") for name in missing), missing
    return model.to(torch.bfloat16).eval()


def te_spec(**kwargs):
    """TE's spec with Megatron's own attention, which runs on a CPU."""
    from megatron.core.models.gpt import gpt_layer_specs

    return _with_local_attention(
        gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**kwargs)
    )


def inference_spec():
    """The inference-optimized spec with Megatron's own attention."""
    from megatron.core.models.gpt import gpt_layer_specs

    return _with_local_attention(gpt_layer_specs.get_gpt_layer_with_inference_spec())


def _with_local_attention(spec):
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    spec.submodules.self_attention.submodules.core_attention = DotProductAttention
    return spec


@contextmanager
def counting():
    """A list that grows by the name of each collective that TE's and Megatron's TE layers call."""
    from megatron.core.tensor_parallel import inference_layers
    from transformer_engine.pytorch.module import linear

    calls = []

    def counted(name, original):
        def collective(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        return collective

    originals = [
        (module, name, getattr(module, name))
        for module in (linear, inference_layers)
        for name in COLLECTIVES
        if hasattr(module, name)
    ]
    for module, name, original in originals:
        setattr(module, name, counted(name, original))
    try:
        yield calls
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def logits_and_calls(model) -> dict:
    with counting() as calls:
        return {"logits": whole_logits(model), "calls": calls}


def attributes(model) -> list[dict]:
    """Everything that the model's row-parallel linears hold, hooks included."""
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

    found = []
    for module in model.modules():
        if isinstance(module, TERowParallelLinear):
            values = {**vars(module), **module._parameters}
            values["_forward_hooks"] = dict(module._forward_hooks)
            found.append(values)
    return found


def unchanged(model, before: list[dict]) -> bool:
    return all(
        mine.keys() == theirs.keys()
        and all(mine[key] is theirs[key] or mine[key] == theirs[key] for key in mine)
        for mine, theirs in zip(attributes(model), before, strict=True)
    )


def applied(model, index, collective: str = "one-shot") -> dict:
    """What a model gives natively, in low bits, and natively again."""
    import megatron_lowbit

    result = {"native": logits_and_calls(model)}
    before, keys = attributes(model), list(model.state_dict())
    handle = megatron_lowbit.apply(model, index, collective=collective)
    result["text"] = str(handle)
    result["low"] = logits_and_calls(model)
    result["keys"] = list(model.state_dict()) == keys
    traffic = [status.traffic for status in handle.status()]
    result["sent"] = [(counters.calls, counters.sent_bytes) for counters in traffic]
    handle.remove()
    result["unchanged"] = unchanged(model, before)
    result["removed"] = logits_and_calls(model)
    return result


def specs(out: Path, sequence_parallel: bool) -> dict:
    """One checkpoint in the local spec, TE's, and with sequence parallelism the inference spec."""
    from megatron_lowbit.integration.sums.sync_points import fingerprint, transformer_layers

    local = build(torch.bfloat16, sequence_parallel=sequence_parallel)
    index, _ = make_index(local, out)
    models = {"local": local, "te": same_weights(local, te_spec())}
    if sequence_parallel:
        models["inference"] = same_weights(local, inference_spec())
    result = {name: applied(model, index) for name, model in models.items()}
    for name, model in models.items():
        layers = transformer_layers(model).values()
        result[name]["fingerprints"] = [fingerprint(layer) for layer in layers]
    result["calibrated"] = calibrated_alike(index, models["te"], out / "te")
    result["gradients"] = {name: gradients(models[name], index) for name in ("local", "te")}
    return result


def calibrated_alike(index, model, out: Path) -> bool:
    """Whether calibrating the TE model gives the local one's index."""
    mine, _ = make_index(model, out)
    assert mine.manifest["chain"] == index.manifest["chain"]
    assert set(mine.manifest["chain"].values()) == {""}
    return all(
        torch.equal(mine.record(layer, name).second_moment, record.second_moment)
        for layer, points in index.layers.items()
        for name, record in points.items()
    )


def gradients(model, index) -> list[torch.Tensor]:
    """Gradients of the weights before and in a row-parallel linear, through the low-bit path."""
    from megatron.core import parallel_state

    import megatron_lowbit
    from megatron_lowbit.model.forward import forward

    # What Megatron keeps there from inference mode takes no gradients.
    parallel_state.get_global_memory_buffer().buffer.clear()
    handle = megatron_lowbit.apply(model, index, collective="one-shot")
    tokens = (torch.arange(LENGTH) * 7 % VOCAB)[None]
    with counting() as calls:
        forward(model, tokens).float().square().mean().backward()
    handle.remove()
    mlp = model.decoder.layers[0].mlp
    found = [mlp.linear_fc1.weight.grad.clone(), mlp.linear_fc2.weight.grad.clone()]
    model.zero_grad()
    # In the backward pass only the column-parallel linears reduce.
    return [*found, torch.tensor(len(calls))]


def biases(config) -> dict:
    """A linear with a bias that it adds itself or gives back: natively and through a hook.

    The reducers are Megatron's own functions, so that all must be equal, gradients included.
    """
    from megatron.core import tensor_parallel
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

    from megatron_lowbit.integration.sums.sync_points import Attachment, SyncPoint

    def reduce(partial, scatter):
        name = "reduce_scatter_to_sequence_parallel" if scatter else "reduce_from_tensor_model"
        function = getattr(tensor_parallel, f"{name}_{'region' if scatter else 'parallel_region'}")
        return function(partial)

    result = {}
    for sequence_parallel in (False, True):
        for skip in (False, True):
            config.sequence_parallel = sequence_parallel
            linear = TERowParallelLinear(
                HIDDEN,
                HIDDEN,
                config=config,
                init_method=config.init_method,
                bias=True,
                input_is_parallel=True,
                skip_bias_add=skip,
                is_expert=False,
            )
            torch.nn.init.normal_(linear.bias)
            native = run_linear(linear)
            attachment = Attachment([SyncPoint(1, "mlp.linear_fc2", linear)], [reduce])
            low = run_linear(linear)
            attachment.remove()
            again = run_linear(linear)
            result[sequence_parallel, skip] = {"native": native, "low": low, "again": again}
    return result


def run_linear(linear) -> dict:
    """Output, bias that is given back, gradients and TE's calls of one linear."""
    torch.manual_seed(7 + dist.get_rank())
    x = torch.randn(LENGTH, 1, HIDDEN // dist.get_world_size(), dtype=torch.bfloat16)
    x.requires_grad_()
    linear.zero_grad()
    with counting() as calls:
        out, bias = linear(x)
        total = out if bias is None else out + bias
        total.float().square().sum().backward()
    tensors = [out.detach(), x.grad, linear.weight.grad.clone(), linear.bias.grad.clone()]
    if bias is not None:
        tensors.append(bias.detach().clone())
    return {"tensors": tensors, "calls": calls, "scattered": out.shape[0] < LENGTH}


def refusals(out: Path) -> dict:
    """What must be refused, none of which may change a module, and what stays native."""
    import megatron_lowbit
    from megatron_lowbit.integration.sums import transformer_engine as route
    from megatron_lowbit.integration.sums.simulate import find_summing
    from megatron_lowbit.integration.sums.sync_points import find_sync_points

    model = same_weights(build(torch.bfloat16, sequence_parallel=True), te_spec())
    linear, config = model.decoder.layers[0].mlp.linear_fc2, model.config
    find = lambda: find_sync_points(model)  # noqa: E731
    found = {}
    linear.parallel_mode = None
    _, found["native"] = find()
    linear.parallel_mode = "row"
    for name, owner, attribute, value in (
        ("userbuffers", linear, "ub_overlap_rs_fprop", True),
        ("fp8", config, "fp8", "hybrid"),
        ("no_group", linear, "tp_group", None),
    ):
        before = getattr(owner, attribute)
        setattr(owner, attribute, value)
        found[name] = message(find)
        setattr(owner, attribute, before)
    del linear.gemm_bias_unfused_add
    found["missing"] = message(find)
    linear.gemm_bias_unfused_add = False
    kind = type(linear)
    linear.__class__ = type("TunedLinear", (kind,), {"forward": lambda self, x: (x, None)})
    found["own_forward"] = message(find)
    linear.__class__ = kind
    renamed = inspect.getsource(kind.__mro__[2]).replace("self.parallel_mode", "self.mode")
    route.reads_in_forward.cache_clear()
    with mock.patch("inspect.getsource", lambda _: renamed):
        found["unread"] = message(find)
    route.reads_in_forward.cache_clear()
    found["gather"] = message(
        lambda: megatron_lowbit.apply(model, out / "lowbit", all_gather_bits=6)
    )
    found["simulate"] = message(lambda: find_summing(model, 3))
    found["fine"] = message(find)
    return found | fused_refusals()


def fused_refusals() -> dict[str, str]:
    """Of MLPs that never call their linear, and of the inference-optimized layers."""
    from megatron_lowbit.integration.sums.sync_points import find_sync_points

    found = {}
    local = build(torch.bfloat16)
    fused = same_weights(local, te_spec(use_te_op_fuser=True))
    found["op_fuser"] = message(lambda: find_sync_points(fused))
    local = build(torch.bfloat16, sequence_parallel=True)
    model = same_weights(local, inference_spec())
    linear = model.decoder.layers[1].self_attention.linear_proj
    for name, owner, attribute in (
        ("fuse_tp", linear.config, "inference_fuse_tp_communication"),
        ("inference_bias", linear, "apply_bias"),
    ):
        setattr(owner, attribute, True)
        found[name] = message(lambda: find_sync_points(model))
        setattr(owner, attribute, False)
    weight = linear.weight
    del linear.weight
    linear.weight = object()
    found["converted"] = message(lambda: find_sync_points(model))
    linear.weight = weight
    found["inference_fine"] = message(lambda: find_sync_points(model))
    return found


def experts() -> dict:
    """What of a model with routed experts in TE's grouped linears are sync points."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from small_gpt import MOE

    from megatron_lowbit.integration.sums.sync_points import find_sync_points

    config = build(torch.bfloat16, **{**MOE, "moe_grouped_gemm": True}).config
    model = GPTModel(
        config,
        te_spec(num_experts=4, moe_grouped_gemm=True),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
    )
    points, native = find_sync_points(model)
    return {"points": [str(point) for point in points], "native": native}


def switched_off(out: Path) -> dict:
    """Sequence parallelism switched off between calls, as engines do for the steps of decoding."""
    from megatron.core.transformer.utils import set_model_to_sequence_parallel

    import megatron_lowbit

    model = same_weights(build(torch.bfloat16, sequence_parallel=True), te_spec())
    plain = same_weights(build(torch.bfloat16), te_spec())
    result = {}
    for name in ("model", "plain"):
        chosen = {"model": model, "plain": plain}[name]
        handle = megatron_lowbit.apply(chosen, out / "lowbit", collective="one-shot")
        if name == "model":
            set_model_to_sequence_parallel(model, False)
        result[name] = logits_and_calls(chosen)
        handle.remove()
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

    parallel_state.initialize_model_parallel(dist.get_world_size())
    if hasattr(parallel_state, "_set_global_symmetric_memory_buffer"):  # until 0.16
        parallel_state._set_global_symmetric_memory_buffer()
    results = {
        "version": megatron.core.__version__,
        False: specs(out / "plain", sequence_parallel=False),
        True: specs(out / "sp", sequence_parallel=True),
        "biases": biases(build(torch.bfloat16, bias=True).config),
        "refusals": refusals(out / "sp"),
        "experts": experts(),
        "switched_off": switched_off(out / "plain"),
        "layers": LAYERS,
    }
    torch.save(results, out / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
