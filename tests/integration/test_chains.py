"""Error feedback inside Megatron, in the ranks of TP 2 on each supported release.

What is in a chain, and what is refused: test_chain_members.py.
"""

import argparse
import gc
import warnings
import weakref

import pytest
import torch
from chain_models import POINTS, build_chain, chain_of, index_of, reasons
from chain_oracle import assert_follows_chain
from releases import RELEASES
from small_gpt import HIDDEN, LENGTH, VOCAB, in_training, low, rules, whole_logits, whole_vocabulary

from megatron_lowbit.benchmark.codecs.closeness import sqnr
from megatron_lowbit.calibration.index_files import write_index
from megatron_lowbit.integration.arguments import add_lowbit_args, apply_from_args
from megatron_lowbit.integration.sums import chains
from megatron_lowbit.model.forward import logits

pytestmark = [
    pytest.mark.on_ranks(2),
    pytest.mark.support("error feedback"),
    pytest.mark.parametrize("release", RELEASES, indirect=True),
]
COLLECTIVES = ["one-shot", "two-shot"]


@pytest.fixture(scope="module")
def model(release):
    return build_chain()


@pytest.fixture(scope="module")
def index(model):
    return index_of(model)


def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    """``[batch, tokens, vocabulary]``."""
    return torch.stack([whole_vocabulary(row) for row in logits(model, tokens)])


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_errors_are_carried_by_default(model, index, native, collective):
    """Said in status and line, the same in every pass, and nearer to native."""
    with low(model, index, collective=collective, bits=3, feedback=False) as handle:
        assert reasons(handle) == ["off"] * POINTS
        assert "errors are not carried" in str(handle)
        plain = whole_logits(model)
    with low(model, index, collective=collective, bits=3) as handle:
        assert reasons(handle) == ["carried"] * POINTS
        assert f"errors carried between {POINTS} sync points, " in str(handle)
        carried = whole_logits(model)
        assert torch.equal(whole_logits(model), carried)
    assert sqnr(native, carried) > sqnr(native, plain) + 1
    assert torch.equal(whole_logits(model), native)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_carries_are_counted_and_freed(model, index, collective):
    counts = dict(sync_points=POINTS, bytes=0, dropped=0, bounded=0)
    with low(model, index, collective=collective, bits=3) as handle:
        assert handle.feedback() == counts
        whole_logits(model)
        counts["bytes"] = handle.feedback()["bytes"]
        most = 4 * LENGTH * HIDDEN * 2 * (2 if collective == "two-shot" else 1)
        assert 0 < counts["bytes"] <= most
        whole_logits(model)
        assert handle.feedback() == counts
        chain = weakref.ref(handle._links[0].chain)
    gc.collect()
    assert chain() is None, "remove() frees the carries"
    assert handle.feedback() == dict(sync_points=0, bytes=0, dropped=0, bounded=0)


def test_the_papers_codec_carries_only_if_asked(model, index):
    with low(model, index, codec="static-hybrid") as handle:
        assert reasons(handle) == ["off"] * POINTS
    with low(model, index, codec="static-hybrid", feedback=True) as handle:
        assert reasons(handle) == ["carried"] * POINTS
        assert_follows_chain(model, handle)


@pytest.mark.parametrize(("flags", "said"), [([], "carried"), (["--lowbit-no-feedback"], "off")])
def test_a_flag_switches_it_off(model, index, tmp_path, flags, said):
    write_index(index, tmp_path / "lowbit")
    argv = ["--lowbit-tp-comm", str(tmp_path / "lowbit"), *flags]
    handle = apply_from_args(model, add_lowbit_args(argparse.ArgumentParser()).parse_args(argv))
    assert reasons(handle) == [said] * POINTS
    handle.remove()


def test_models_side_by_side_keep_to_their_own(model, index):
    """One runs a whole pass inside a pass of the other."""
    other, inner = build_chain(seed=2), []
    fixed = {"collective": "two-shot"}
    with low(model, index, **fixed) as one, low(other, index_of(other), **fixed) as two:
        alone = [whole_logits(each) for each in (model, other)]
        layer = model.decoder.layers[1]
        with layer.register_forward_pre_hook(lambda *_: inner.append(whole_logits(other))):
            outer = whole_logits(model)
        assert torch.equal(outer, alone[0])
        assert torch.equal(inner[0], alone[1])
        assert one.feedback()["dropped"] == two.feedback()["dropped"] == 0


def test_an_exception_in_a_pass_leaves_nothing_for_the_next(model, index):
    """Be it as long as that one or not."""
    tokens = (torch.arange(LENGTH) * 5 % VOCAB)[None]

    def stop(*_):
        raise KeyboardInterrupt

    with low(model, index, collective="two-shot") as handle:
        expected = logits_of(model, tokens)
        for number, layer in enumerate(model.decoder.layers):
            for length in (LENGTH, 5):
                hook = layer.mlp.register_forward_pre_hook(stop)
                with hook, pytest.raises(KeyboardInterrupt):
                    logits_of(model, tokens.flip(1)[:, :length])
                assert torch.equal(logits_of(model, tokens), expected), (number, length)
        assert handle.feedback()["dropped"] == 0


def spoilt(model, number: int, tokens: torch.Tensor) -> torch.Tensor:
    """Logits where a layer's MLP is given a NaN in one token."""

    def spoil(module, inputs):
        (x, *rest) = (x.clone() for x in inputs)
        x[9, 0, 3] = torch.nan  # [tokens, batch, hidden]
        return (x, *rest)

    with model.decoder.layers[number].mlp.register_forward_pre_hook(spoil):
        return logits_of(model, tokens)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_nan_goes_where_it_goes_natively(model, index, collective):
    """Attention spreads it; into no other token or pass."""
    tokens = torch.stack([torch.arange(LENGTH) * k % VOCAB for k in (5, 7)])
    native = [spoilt(model, number, tokens) for number in range(3)]
    assert native[2].isnan().any(-1).sum() == 1, "a token"
    with low(model, index, collective=collective):
        clean = logits_of(model, tokens)
        for number, expected in enumerate(native):
            found, lost = spoilt(model, number, tokens), expected.isnan()
            assert torch.equal(found.isnan(), lost), number
            assert torch.equal(found[~lost], clean[~lost]), number
            assert torch.equal(logits_of(model, tokens), clean), number


def test_training_is_without_feedback_and_says_so_once(model, index):
    """In inference afterwards with it."""
    with low(model, index, bits=4, feedback=False):
        plain = whole_vocabulary(in_training(model)[0].detach())
    chains._say_once.cache_clear()
    with low(model, index, bits=4) as handle, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        expected = whole_logits(model)
        assert not [w for w in said if "feedback" in str(w.message)]
        for mode in (False, True):  # gradients, then training
            model.train(mode)
            assert torch.equal(whole_vocabulary(in_training(model)[0].detach()), plain), mode
        assert set(reasons(handle)) == {"off: the model is in training mode"}
        model.eval()
        assert set(reasons(handle)) == {"carried"}
        (about,) = [str(w.message) for w in said if "no error feedback" in str(w.message)]
        assert "model.eval()" in about
        assert torch.equal(whole_logits(model), expected)
        assert not torch.equal(expected, plain)
        assert handle.feedback()["dropped"] == 0


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_token_gets_in_a_batch_and_before_padding_what_it_gets_alone(model, index, collective):
    """Wherever Megatron itself gives that."""
    batch = torch.stack([torch.arange(LENGTH) * k % VOCAB for k in (5, 7, 11)])
    native = logits_of(model, batch)
    assert torch.equal(logits_of(model, batch[:1]), native[:1])
    assert torch.equal(logits_of(model, batch[:1, :9]), native[:1, :9])
    with low(model, index, collective=collective) as handle:
        whole = logits_of(model, batch)
        for row in range(3):
            assert torch.equal(logits_of(model, batch[row : row + 1])[0], whole[row])
        assert torch.equal(logits_of(model, batch[:, :9]), whole[:, :9])
        assert handle.feedback()["dropped"] == 0


def test_a_residual_stream_in_fp32(release):
    model = build_chain(fp32_residual_connection=True)
    for name, module in model.named_modules():
        if "norm" in name:  # as fused norms do: torch's own would stay in fp32
            module.register_forward_hook(lambda m, i, out: out.to(torch.bfloat16))
    index = index_of(model)
    assert set(chain_of(index)) == {""}
    for collective in COLLECTIVES:
        with low(model, index, collective=collective) as handle:
            assert set(reasons(handle)) == {"carried"}
            if collective == "one-shot":
                assert_follows_chain(model, handle, collective)
            assert handle.feedback()["dropped"] == 0


def test_with_0_bits_the_next_sync_point_sends_the_sum(model, index):
    with low(model, index, recipe=rules({"match": "2.mlp.*", "bits": 0})) as handle:
        assert_follows_chain(model, handle)
        assert [status.codec.bits for status in handle.status()] == [4, 4, 4, 0, 4, 6]
        sent = [point["choices"][0] for point in handle.stats()["sync_points"]]
        assert [one["sent_bytes"] > 0 for one in sent] == [True] * 3 + [False] + [True] * 2
        assert sent[3]["collective"] == "skip"
        assert handle.feedback()["dropped"] == 0
