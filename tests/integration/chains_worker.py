"""Error feedback inside Megatron: checks that run and assert in 2 forked ranks of TP 2.

Run by test_chains.py, once a release. What a check raised on this rank goes to OUT/rankN.pt, by the
check's name: one that fails on every rank leaves the others alone.
"""

import argparse
import contextlib
import copy
import gc
import json
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from chain_oracle import assert_follows_chain
from small_gpt import HIDDEN, LENGTH, MOE, VOCAB, build, message, whole_logits, whole_vocabulary
from torch import Tensor, nn

import megatron_lowbit
from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.integration.cpu.device import enable_cpu

POINTS = 6
DEEP = {"num_layers": POINTS // 2}
CHECKS: dict[str, Callable] = {}


def check(function: Callable) -> Callable:
    """Register a check: it takes an empty folder."""
    CHECKS[function.__name__] = function
    return function


def index_of(model: nn.Module, out: Path, simulate_tp: int | None = None):
    """A calibration index for `shaped-hybrid` from random tokens."""
    from megatron_lowbit.integration.loops.calibrate_checkpoint import calibrate_model

    index, _ = calibrate_model(
        model,
        torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0)),
        codec=get_codec("shaped-hybrid"),
        bf16_features=0,
        corpus={"sha256": "0"},
        partial=out / "partial",
        simulate_tp=simulate_tp,
    )
    return index


def without_chain(index):
    """An index of before chains were checked."""
    manifest = {key: value for key, value in index.manifest.items() if key != "chain"}
    return replace(index, manifest=manifest)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """``[batch, tokens, vocabulary]``."""
    from megatron_lowbit.model.forward import logits

    return torch.stack([whole_vocabulary(row) for row in logits(model, tokens)])


@contextlib.contextmanager
def low(model: nn.Module, index, **wishes) -> Iterator:
    """A model in low bits, one-shot unless it is said."""
    handle = megatron_lowbit.apply(model, index, **{"collective": "one-shot", **wishes})
    try:
        yield handle
    finally:
        handle.remove()


def reasons(handle) -> list[str]:
    """What `status()` says of feedback at each sync point."""
    return [status.feedback for status in handle.status()]


@check
def carried(out: Path) -> None:
    """By default, said in status and line, counted, the same in every pass, nearer to native."""
    model = build(torch.bfloat16, **DEEP)
    index, native = index_of(model, out), whole_logits(model)
    for collective in ("one-shot", "two-shot"):
        with low(model, index, collective=collective, bits=3, feedback=False) as handle:
            assert reasons(handle) == ["off"] * POINTS
            assert "errors are not carried" in str(handle)
            plain = whole_logits(model)
        with low(model, index, collective=collective, bits=3) as handle:
            assert reasons(handle) == ["carried"] * POINTS
            assert f"errors carried between {POINTS} sync points, " in str(handle)
            assert handle.feedback() == dict(sync_points=POINTS, bytes=0, dropped=0, bounded=0)
            first = whole_logits(model)
            used = handle.feedback()["bytes"]
            assert 0 < used <= 4 * LENGTH * HIDDEN * 2 * (2 if collective == "two-shot" else 1)
            assert torch.equal(whole_logits(model), first)
            assert handle.feedback() == dict(sync_points=POINTS, bytes=used, dropped=0, bounded=0)
            chain = weakref.ref(handle._links[0].chain)
        gc.collect()
        assert chain() is None, "remove() frees the carries"
        assert handle.feedback() == dict(sync_points=0, bytes=0, dropped=0, bounded=0)
        assert sqnr(native, first) > sqnr(native, plain) + 1, (sqnr(native, first), collective)
    assert torch.equal(whole_logits(model), native)


@check
def stronger_end(out: Path) -> None:
    """The last sync point, which nothing repairs, has 6 bits where nobody planned."""
    model = build(torch.bfloat16, **DEEP)
    with low(model, index_of(model, out)) as handle:
        assert [status.codec.bits for status in handle.status()] == [4] * (POINTS - 1) + [6]
        assert_follows_chain(model, handle)


@check
def codecs_and_switches(out: Path) -> None:
    """The paper's codec only if asked; `--lowbit-no-feedback`; folded weights never."""
    from megatron_lowbit.calibration.index_files import write_index
    from megatron_lowbit.integration.arguments import add_lowbit_args, apply_from_args

    model = build(torch.bfloat16, **DEEP)
    index = index_of(model, out)
    with low(model, index, codec="static-hybrid") as handle:
        assert reasons(handle) == ["off"] * POINTS
    with low(model, index, codec="static-hybrid", feedback=True) as handle:
        assert reasons(handle) == ["carried"] * POINTS
        assert_follows_chain(model, handle)
    with low(model, index, fold=True) as handle:
        assert reasons(handle) == ["off"] * POINTS
    assert "cannot be carried" in message(
        lambda: megatron_lowbit.apply(model, index, fold=True, feedback=True)
    )
    if dist.get_rank() == 0:
        write_index(index, out / "lowbit")
    dist.barrier()
    for flags, expected in (([], "carried"), (["--lowbit-no-feedback"], "off")):
        argv = ["--lowbit-tp-comm", str(out / "lowbit"), *flags]
        args = add_lowbit_args(argparse.ArgumentParser()).parse_args(argv)
        handle = apply_from_args(model, args)
        assert reasons(handle) == [expected] * POINTS
        handle.remove()


@check
def ranks_that_differ(out: Path) -> None:
    """In feedback, at load."""
    model = build(torch.bfloat16, **DEEP)
    index, mine = index_of(model, out), dist.get_rank() == 0
    said = message(lambda: megatron_lowbit.apply(model, index, feedback=mine))
    assert said.startswith("ranks differ in their codec, feedback, dtype or calibration index: "), (
        said
    )
    assert "errors carried" in said, said
    assert "errors not carried" in said, said


@check
def models_side_by_side(out: Path) -> None:
    """One runs a whole pass inside a pass of the other: neither takes what is the other's."""
    models = [build(torch.bfloat16, seed=seed, **DEEP) for seed in (1, 2)]
    handles = [
        megatron_lowbit.apply(m, index_of(m, out / str(n)), collective="two-shot")
        for n, m in enumerate(models)
    ]
    alone, inner = [whole_logits(model) for model in models], []
    hook = (
        models[0]
        .decoder.layers[1]
        .register_forward_pre_hook(lambda *_: inner.append(whole_logits(models[1])))
    )
    assert torch.equal(whole_logits(models[0]), alone[0])
    hook.remove()
    assert torch.equal(inner[0], alone[1])
    for handle in handles:
        assert handle.feedback()["dropped"] == 0
        handle.remove()


@check
def stopped_pass(out: Path) -> None:
    """An exception in the middle leaves nothing for the next pass, of its own length or not."""
    model = build(torch.bfloat16, **DEEP)
    tokens = (torch.arange(LENGTH) * 5 % VOCAB)[None]

    def stop(*_):
        raise KeyboardInterrupt

    with low(model, index_of(model, out), collective="two-shot") as handle:
        expected = logits_of(model, tokens)
        for number, layer in enumerate(model.decoder.layers):
            for length in (LENGTH, 5):
                hook = layer.mlp.register_forward_pre_hook(stop)
                with contextlib.suppress(KeyboardInterrupt):
                    logits_of(model, tokens.flip(1)[:, :length])
                hook.remove()
                assert torch.equal(logits_of(model, tokens), expected), (number, length)
        assert handle.feedback()["dropped"] == 0


@check
def not_a_number(out: Path) -> None:
    """It goes where it goes natively (attention spreads it), and into no other token or pass."""
    model = build(torch.bfloat16, **DEEP)
    tokens = torch.stack([torch.arange(LENGTH) * k % VOCAB for k in (5, 7)])

    def spoil(module, inputs):
        (x, *rest) = (x.clone() for x in inputs)
        x[9, 0, 3] = torch.nan  # [tokens, batch, hidden]
        return (x, *rest)

    def spoilt(number: int) -> Tensor:
        hook = model.decoder.layers[number].mlp.register_forward_pre_hook(spoil)
        try:
            return logits_of(model, tokens)
        finally:
            hook.remove()

    native = [spoilt(number) for number in range(3)]
    assert native[2].isnan().any(-1).sum() == 1, "a token"
    index = index_of(model, out)
    for collective in ("one-shot", "two-shot"):
        with low(model, index, collective=collective):
            clean = logits_of(model, tokens)
            for number, expected in enumerate(native):
                found, lost = spoilt(number), expected.isnan()
                assert torch.equal(found.isnan(), lost), (collective, number)
                assert torch.equal(found[~lost], clean[~lost]), (collective, number)
                assert torch.equal(logits_of(model, tokens), clean), (collective, number)


@check
def training(out: Path) -> None:
    """Without feedback, said once; in inference afterwards with it."""
    from megatron_lowbit.integration.sums import chains
    from megatron_lowbit.model.forward import forward

    model = build(torch.bfloat16, **DEEP)
    index, tokens = index_of(model, out), (torch.arange(LENGTH) * 7 % VOCAB)[None]
    with low(model, index, bits=4, feedback=False):
        plain = whole_vocabulary(forward(model, tokens)[0].detach())
    chains._say_once.cache_clear()
    with low(model, index, bits=4) as handle, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        expected = whole_logits(model)
        assert not [w for w in said if "feedback" in str(w.message)]
        for mode in (False, True):  # gradients, then training
            model.train(mode)
            assert torch.equal(whole_vocabulary(forward(model, tokens)[0].detach()), plain), mode
        model.eval()
        about = [str(w.message) for w in said if "no error feedback" in str(w.message)]
        assert len(about) == 1, said
        assert "model.eval()" in about[0]
        assert torch.equal(whole_logits(model), expected)
        assert not torch.equal(expected, plain)
        assert handle.feedback()["dropped"] == 0


@check
def bits_of_a_token_alone(out: Path) -> None:
    """In a batch, and before padding: what it gets alone, wherever Megatron itself gives that."""
    model = build(torch.bfloat16, **DEEP)
    batch = torch.stack([torch.arange(LENGTH) * k % VOCAB for k in (5, 7, 11)])
    native = [logits_of(model, batch), logits_of(model, batch[:1]), logits_of(model, batch[:1, :9])]
    assert torch.equal(native[0][:1], native[1])
    assert torch.equal(native[1][:, :9], native[2])
    index = index_of(model, out)
    for collective in ("one-shot", "two-shot"):
        with low(model, index, collective=collective) as handle:
            whole = logits_of(model, batch)
            for row in range(3):
                assert torch.equal(logits_of(model, batch[row : row + 1])[0], whole[row])
            assert torch.equal(logits_of(model, batch[:, :9]), whole[:, :9])
            assert handle.feedback()["dropped"] == 0


def own(function: Callable) -> Callable:
    """A function as a fork has it."""
    function.__module__ = "my_fork.layers"
    return function


def _layer_scale(layer: nn.Module) -> None:
    """As in RETRO or a vision model: the sum is scaled before it is added."""
    original = layer.self_attn_bda
    layer.self_attn_bda = own(
        lambda training, fused: (
            lambda out, residual, dropout: original(training, fused)(
                (out[0] * 0.5, out[1]), residual, dropout
            )
        )
    )


def _post_norm_child(layer: nn.Module) -> None:
    layer.after_attention = nn.LayerNorm(HIDDEN, dtype=torch.bfloat16)


def _own_method(name: str) -> Callable:
    def change(layer: nn.Module) -> None:
        kind = type(layer)
        original = getattr(kind, name)
        method = own(lambda self, *args, **kwargs: original(self, *args, **kwargs))
        layer.__class__ = type("MyLayer", (kind,), {name: method})

    return change


def _hook_at(path: str) -> Callable:
    return lambda layer: layer.get_submodule(path).register_forward_hook(own(lambda *_: None))


def _replaced_forward(layer: nn.Module) -> None:
    original = layer.mlp.forward
    layer.mlp.forward = own(lambda *args, **kwargs: original(*args, **kwargs))


def _config_field(name: str, value: object) -> Callable:
    def change(layer: nn.Module) -> None:
        layer.config = copy.copy(layer.config)
        setattr(layer.config, name, value)

    return change


# What stands between sum and stream in layer 2: attention's reason, the MLP's reason.
STRANGERS: dict[str, tuple[Callable, str, str]] = {
    "layer scale": (_layer_scale, "its self_attn_bda is not Megatron's own", ""),
    "post norm": (_post_norm_child, "has a child after_att", "has a child after_att"),
    "forward": (_own_method("forward"), "MyLayer has a forward", "MyLayer has a forward"),
    "_forward_mlp": (_own_method("_forward_mlp"), "MyLayer has a _forw", "MyLayer has a _forw"),
    "hook on the layer": (_hook_at(""), "has a forward hook", "has a forward hook"),
    "hook on the MLP": (_hook_at("mlp"), "", "its MLP has a forward hook"),
    "hook on the linear": (_hook_at("mlp.linear_fc2"), "", "Linear has a forward hook"),
    "hook on attention": (_hook_at("self_attention"), "Attention has a forward hook", ""),
    "replaced forward": (_replaced_forward, "", "forward of its MLP was replaced"),
    "hyper-connections": (_config_field("enable_mhc_connections", True), "hyper", "hyper"),
    "chunks of the MLP": (_config_field("mlp_chunks_for_prefill", 2), "", "in chunks of the pro"),
}


@check
def strangers(out: Path) -> None:
    """What stands outside the chain neither gives nor takes; the carry passes it by."""
    index = without_chain(index_of(build(torch.bfloat16, **DEEP), out))
    for case, (change, attention, mlp) in STRANGERS.items():
        model = build(torch.bfloat16, **DEEP)
        change(model.decoder.layers[1])
        with low(model, index) as handle:
            found = reasons(handle)
            assert found[:2] == found[4:] == ["carried"] * 2, (case, found)
            for said, expected in zip(found[2:4], (attention, mlp), strict=True):
                assert said.startswith("off: ") if expected else said == "carried", (case, found)
                assert expected in said, (case, found)
            outside = [said.removeprefix("off: ") for said in found if said != "carried"]
            assert f"carried between {POINTS - len(outside)} sync points" in str(handle), case
            assert all(f": {reason})" in str(handle) for reason in outside), (case, str(handle))
            assert_follows_chain(model, handle, case)
            assert handle.feedback()["dropped"] == 0, case


@check
def linears_that_norm(out: Path) -> None:
    """Megatron-Bridge's for Gemma 2 and 3: the norm would be given a partial."""
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    class Normed(RowParallelLinear):
        def forward(self, x):
            out, bias = super().forward(x)
            return nn.functional.layer_norm(out, (HIDDEN,)), bias

    Normed.__module__ = "my_fork.linears"
    model = build(torch.bfloat16, **DEEP)
    index = index_of(model, out)
    model.decoder.layers[1].mlp.linear_fc2.__class__ = Normed
    said = message(lambda: megatron_lowbit.apply(model, index))
    assert said.startswith("layer 2 mlp.linear_fc2 has a forward pass of its own, that of Normed")


@check
def experts(out: Path) -> None:
    """A shared expert carries, routed experts are no sync points, a gate stands in between."""
    model = build(torch.bfloat16, **MOE, **DEEP)
    index = index_of(model, out)
    assert set(index.manifest["chain"].values()) == {""}
    with low(model, index) as handle:
        assert reasons(handle) == ["carried"] * POINTS
        assert len(handle.native) == POINTS // 2
        assert_follows_chain(model, handle)
    overlapped = {"moe_token_dispatcher_type": "alltoall", "moe_shared_expert_overlap": True}
    model = build(torch.bfloat16, **{**MOE, **overlapped}, **DEEP)
    index = index_of(model, out)
    assert set(index.manifest["chain"].values()) == {""}
    with low(model, index) as handle:
        assert reasons(handle) == ["carried"] * POINTS
        assert_follows_chain(model, handle)
    model.decoder.layers[1].mlp._inference_token_dispatcher = None  # as NVLS has one: calls whole
    with low(model, index) as handle:
        assert reasons(handle) == ["carried"] * (POINTS - 1)
        whole = handle.native["layer 2 mlp.shared_experts.linear_fc2"]
        assert whole == "shared experts that the inference dispatcher calls whole"
    model = build(torch.bfloat16, **MOE, **DEEP)
    shared = model.decoder.layers[1].mlp.shared_experts
    shared.use_shared_expert_gate = True
    shared.gate_weight = nn.Parameter(torch.randn(1, HIDDEN, dtype=torch.bfloat16))
    with low(model, without_chain(index)) as handle:
        assert reasons(handle)[3] == "off: a gate scales its sum"
        assert reasons(handle).count("carried") == POINTS - 1
        assert_follows_chain(model, handle)


@check
def residuals(out: Path) -> None:
    """Streams in fp32, and streams that are split over the ranks."""
    for case in ({"fp32_residual_connection": True}, {"sequence_parallel": True}):
        # The spec of sequence parallelism has two layers.
        model = build(torch.bfloat16, **case, **({} if "sequence_parallel" in case else DEEP))
        for name, module in model.named_modules():
            if "norm" in name:  # as fused norms do: torch's own would stay in fp32
                module.register_forward_hook(lambda m, i, out: out.to(torch.bfloat16))
        index = index_of(model, out)
        assert set(index.manifest["chain"].values()) == {""}, case
        for collective in ("one-shot", "two-shot"):
            with low(model, index, collective=collective) as handle:
                assert set(reasons(handle)) == {"carried"}, case
                if collective == "one-shot" or "sequence_parallel" in case:
                    assert_follows_chain(model, handle, case)
                assert handle.feedback()["dropped"] == 0, case


@check
def zero_bits(out: Path) -> None:
    """No message at all, the next sync point sends it; what would be lost is refused."""
    model = build(torch.bfloat16, **DEEP)
    index = index_of(model, out)

    path = out / f"rules{dist.get_rank()}.json"

    def skipping(*names: str, **wishes) -> dict:
        path.write_text(json.dumps([{"match": name, "bits": 0} for name in names]))
        return {"recipe": path, **wishes}

    with low(model, index, **skipping("2.mlp.*")) as handle:
        assert_follows_chain(model, handle)
        assert [status.codec.bits for status in handle.status()] == [4, 4, 4, 0, 4, 6]
        sent = [point["choices"][0] for point in handle.stats()["sync_points"]]
        assert [one["sent_bytes"] > 0 for one in sent] == [True] * 3 + [False] + [True] * 2
        assert sent[3]["collective"] == "skip"
        assert handle.feedback()["dropped"] == 0
    follows = "has 0 bits, and no sync point with bits follows to send its error: give this one"
    for names, text in {
        ("3.mlp.*",): f"layer 3 mlp.linear_fc2 {follows}",
        ("2.*",): f"layer 2 self_attention.linear_proj {follows}",
        ("*",): f"layer 1 self_attention.linear_proj {follows}",
    }.items():
        said = message(lambda: megatron_lowbit.apply(model, index, **skipping(*names)))  # noqa: B023
        assert said.startswith(text), (names, said)
    said = message(
        lambda: megatron_lowbit.apply(model, index, **skipping("2.mlp.*", feedback=False))
    )
    lost = "layer 2 mlp.linear_fc2 has 0 bits, which only error feedback makes good: leave"
    assert said.startswith(lost), said
    said = message(lambda: megatron_lowbit.apply(model, index, **skipping("2.mlp.*", fold=True)))
    assert said.startswith(lost), said
    for rule, text in (
        ({"codec": "static-hybrid", "bits": 0}, "codec static-hybrid has no 0-bit version"),
        ({"bits": [0, 4]}, "shaped-hybrid cannot have bits 0,4: 0 bits send no message at all"),
        ({"bits": [4, 0]}, "shaped-hybrid cannot have bits 4,0: 0 bits send no message at all"),
        ({"bits": -1}, "-1 is neither 0 to 16 bits nor"),
    ):
        path.write_text(json.dumps([{"match": "2.mlp.*", **rule}]))
        said = message(lambda: megatron_lowbit.apply(model, index, recipe=path))
        assert text in said, said
        assert str(out / "rules") in said, said  # of the rank that found it
    _post_norm_child(model.decoder.layers[1])
    index = without_chain(index)
    said = message(lambda: megatron_lowbit.apply(model, index, **skipping("2.mlp.*")))
    assert said.startswith(
        "layer 2 mlp.linear_fc2 has 0 bits, and its error cannot be carried ("
    ), said
    assert "has a child" in said


def theirs(function: Callable) -> Callable:
    """A function that passes for Megatron's own: structure does not tell it."""
    function.__module__ = "megatron.core.patched"
    return function


@check
def by_numbers(out: Path) -> None:
    """What calibration sees a layer add besides its sums takes it out of the chain."""
    from megatron_lowbit.calibration.index_files import read_index, write_index
    from megatron_lowbit.integration.sums.chain_check import CHANGED, MOVED

    model = build(torch.bfloat16, bias=True, **DEEP)
    assert set(index_of(model, out).manifest["chain"].values()) == {""}
    scaled = model.decoder.layers[1].mlp.register_forward_hook(
        theirs(lambda module, inputs, output: (output[0] * 0.5, output[1]))
    )
    index = index_of(model, out)
    assert [why for why in index.manifest["chain"].values()] == ["", "", CHANGED, CHANGED, "", ""]
    where = out / f"lowbit{dist.get_rank()}"
    write_index(index, where)
    with low(model, read_index(where)) as handle:
        outside = f"off: {CHANGED}"
        assert reasons(handle) == [*["carried"] * 2, *[outside] * 2, *["carried"] * 2]
        assert f"(2: {CHANGED})" in str(handle)
        assert_follows_chain(model, handle)
    model.config.enable_mhc_connections = True
    assert set(index_of(model, out).manifest["chain"].values()) == {
        "hyper-connections mix the stream"
    }
    model.config.enable_mhc_connections = False
    said = message(lambda: write_index(_chained(index, {"layer 1": 3}), where) or read_index(where))
    assert "chain.layer 1: Input should be a valid string" in said, said
    scaled.remove()
    moving = model.decoder.layers[1].register_forward_pre_hook(
        theirs(lambda module, inputs, named: (inputs, _doubled(named))), with_kwargs=True
    )
    index = index_of(model, out)
    assert set(index.manifest["chain"].values()) == {MOVED}
    moving.remove()
    with low(model, index) as handle:
        assert f"errors are not carried (6: {MOVED})" in str(handle)
        assert reasons(handle) == [f"off: {MOVED}"] * POINTS


def _chained(index, chain: dict):
    return replace(index, manifest={**index.manifest, "chain": chain})


def _doubled(named: dict) -> dict:
    return {**named, "hidden_states": named["hidden_states"] * 2}


@check
def rules_are_read_once(out: Path) -> None:
    """A file that changes while it is read twice would give half of each."""
    from megatron_lowbit.integration import assignment

    model = build(torch.bfloat16, **DEEP)
    index, rules = index_of(model, out), out / f"rules{dist.get_rank()}.json"
    rules.write_text('[{"match": "2.mlp.*", "bits": 3}]')
    original, read = assignment.read_rules, []
    assignment.read_rules = lambda path: read.append(path) or original(path)
    try:
        with low(model, index, recipe=rules) as handle:
            assert [status.codec.bits for status in handle.status()] == [4, 4, 4, 3, 4, 6]
    finally:
        assignment.read_rules = original
    assert read == [rules]


@check
def another_chain(out: Path) -> None:
    """Model and index disagree: refused in one line with the first such sync point."""
    model = build(torch.bfloat16, **DEEP)
    index = index_of(model, out)
    asked = (
        ": error feedback needs the model that was calibrated; calibrate this one with "
        "python -m megatron_lowbit calibrate, or do without (--lowbit-no-feedback; no "
        "NAME@feedback in an evaluation)"
    )
    other = _chained(index, {**index.manifest["chain"], "layer 2 mlp.linear_fc2": "its own norm"})
    assert message(lambda: megatron_lowbit.apply(model, other)) == (
        "layer 2 mlp.linear_fc2 is in the chain here, and outside of it (its own norm) in the "
        "calibration index" + asked
    )
    _layer_scale(model.decoder.layers[1])
    assert message(lambda: megatron_lowbit.apply(model, index)) == (
        "layer 2 self_attention.linear_proj is outside the chain here (its self_attn_bda is not "
        "Megatron's own), and in it in the calibration index" + asked
    )
    with low(model, index, feedback=False) as handle:
        assert reasons(handle) == ["off"] * POINTS
    with low(model, index, codec="static-hybrid") as handle:
        assert reasons(handle) == ["off"] * POINTS


@check
def simulated_ranks(out: Path) -> None:
    """One process gives the bits of real ranks, in both collectives. It ends the groups: last."""
    from megatron.core import parallel_state

    from megatron_lowbit.calibration.recipe import Assignment
    from megatron_lowbit.integration.sums.simulate import find_summing

    model = build(torch.bfloat16, **DEEP)
    index = index_of(model, out)
    real = {}
    cases = [(mode, bits) for mode in ("one-shot", "two-shot") for bits in (1, 2, 4, 0)]
    cases += [("two-shot", pair) for pair in ((3, 1), (2, 6))]  # sums in bits of their own
    skip = out / f"rules{dist.get_rank()}.json"
    skip.write_text('[{"match": "2.mlp.*", "bits": 0}]')
    for mode, bits in cases:
        with low(model, index, collective=mode, bits=bits or 4, recipe=None if bits else skip):
            real[mode, bits] = whole_logits(model)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(1)
    model = build(torch.bfloat16, **DEEP)
    summing, _ = find_summing(model, 2)
    for mode, bits in cases:
        given = [Assignment("shaped-hybrid", bits or 4)] * POINTS
        if not bits:  # one sync point alone
            given[3] = Assignment("shaped-hybrid", 0)
        codecs = [assignment.make() for assignment in given]
        each = zip(summing.points, given, strict=True)
        tables = [index.tables_at(point, assignment, 2) for point, assignment in each]
        with summing.using(summing.reducers(codecs, tables, mode, feedback=True)):
            assert torch.equal(whole_logits(model), real[mode, bits]), (mode, bits)
        with summing.using(summing.reducers(codecs, tables, mode)):
            if bits:
                assert not torch.equal(whole_logits(model), real[mode, bits]), (mode, bits)
            else:
                assert "sends nothing: it needs error" in message(lambda: whole_logits(model))


def main(checks: dict[str, Callable] = CHECKS) -> None:
    """Run them on this rank, in order."""
    enable_cpu()
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    import megatron.core
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 forgets it where Transformer Engine is missing
    parallel_state.initialize_model_parallel(2)
    found: dict[str, str] = {"version": megatron.core.__version__}
    for name in args.names or checks:
        (args.out / name).mkdir(exist_ok=True)
        try:
            checks[name](args.out / name)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
            break  # the other rank may wait inside this check: its connection ends with this one
    torch.save(found, args.out / f"rank{dist.get_rank()}.pt")
    if all(error == "" for name, error in found.items() if name != "version"):
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
