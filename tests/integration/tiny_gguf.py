"""A tiny Llama as a GGUF file, as llama.cpp's converter writes it."""

import json
from pathlib import Path

import gguf
from safetensors.torch import load_file
from tiny_llama import SHAPE

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_tensor(name: str, weight):
    """A parameter as llama.cpp's converter writes it: its name, and rotary rows interleaved."""
    stem = name.removesuffix(".weight")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.weight", weight
    _, _, layer, part = stem.split(".", 3)
    heads = {"self_attn.q_proj": 6, "self_attn.k_proj": 3}.get(part)
    if heads:
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        weight = halves.swapaxes(1, 2).reshape(weight.shape).copy()
    return f"blk.{layer}.{_INNER[part]}.weight", weight


def write_gguf(model: Path, path: Path, *, change=lambda writer: None, **fields) -> None:
    """Writes the Llama in the directory `model`, of `tiny_llama`, as the file `path`.

    `change` does something to gguf's writer before the tensors are added. `fields` are said instead
    of what is so, by GGUF's name; None leaves one out.
    """
    said = {
        "context_length": SHAPE["max_position_embeddings"],
        "embedding_length": SHAPE["hidden_size"],
        "block_count": SHAPE["num_hidden_layers"],
        "feed_forward_length": SHAPE["intermediate_size"],
        "attention.head_count": SHAPE["num_attention_heads"],
        "attention.head_count_kv": SHAPE["num_key_value_heads"],
        "vocab_size": SHAPE["vocab_size"],
        **fields,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in said.items():
        if value is not None:
            writer.add_uint32(f"llama.{name}", value)
    writer.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    _add_tokenizer(writer, json.loads((model / "tokenizer.json").read_text())["model"])
    change(writer)
    for name, weight in load_file(model / "model.safetensors").items():
        writer.add_tensor(*gguf_tensor(name, weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, model: dict) -> None:
    """The tokenizer, filled up to the vocabulary."""
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [f"<unused{number}>" for number in range(len(tokens), SHAPE["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
