"""Ways in which a model's directory or GGUF file is damaged, or says what its weights are not.

Each damage takes the directory of a whole model's copy and spoils it, or the file `GGUF` in it.
`DAMAGES` and `GGUF_DAMAGES` have them by name, with words that the line of the refusal must have.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], None]

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0\nsize 538\n"
WEIGHTS = "model.safetensors"
GGUF = "tiny.gguf"
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Changes a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def said(file: str = "config.json", /, **settings) -> Damage:
    """A file of settings says so."""
    return lambda directory: edit(directory / file, lambda content: content.update(settings))


def rope(**settings) -> Damage:
    return lambda d: edit(d / "config.json", lambda c: c["rope_parameters"].update(settings))


def tokens(first: int, end: int) -> Damage:
    """The tokenizer has tokens of these numbers, too."""
    new = {f"new{number}": number for number in range(first, end)}
    return lambda d: edit(d / "tokenizer.json", lambda c: c["model"]["vocab"].update(new))


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Other weights."""

    def damage(directory: Path) -> None:
        content = load_file(directory / WEIGHTS)
        change(content)
        save_file({k: v.contiguous() for k, v in content.items()}, directory / WEIGHTS)

    return damage


def to(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """One tensor is another."""
    return weights(lambda content: content.update({name: change(content[name].clone())}))


def value(name: str, number: float) -> Damage:
    """One value of a tensor is another."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        weight.view(-1)[7] = number
        return weight

    return to(name, change)


def added(name: str, *shape: int) -> Damage:
    return weights(lambda content: content.update({name: torch.ones(shape)}))


def dropped(name: str) -> Damage:
    return weights(lambda content: content.pop(name))


def text(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(data)


def changed(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """A file of other bytes."""
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes()))


def cut(name: str, part: float) -> Damage:
    """A download that ended early."""
    return changed(name, lambda data: data[: int(len(data) * part)])


def header(change: Callable[[bytes], bytes]) -> Damage:
    """The JSON at the head of the safetensors file is another."""

    def with_header(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        new = change(data[8 : 8 + size])
        return struct.pack("<Q", len(new)) + new + data[8 + size :]

    return changed(WEIGHTS, with_header)


def removed(name: str) -> Damage:
    return lambda directory: (directory / name).unlink()


def renamed(name: str) -> Damage:
    """The weights lie in another file."""
    return lambda directory: (directory / WEIGHTS).rename(directory / name)


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    """Something else is where a file was."""

    def damage(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        make(directory / name)

    return damage


def sharded(change: Callable[[Path, dict], object]) -> Damage:
    """Two files and an index, and then something else."""

    def damage(directory: Path) -> None:
        shard(directory)
        edit(directory / f"{WEIGHTS}.index.json", lambda content: change(directory, content))

    return damage


def shard(directory: Path, parts: tuple[str, str] = ("a.safetensors", "b.safetensors")) -> None:
    """Splits a model's weights into two files with an index."""
    content = load_file(directory / WEIGHTS)
    names = sorted(content)
    files = {name: parts[number * 2 // len(names)] for number, name in enumerate(names)}
    for part in parts:
        save_file({n: content[n] for n in names if files[n] == part}, directory / part)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (directory / WEIGHTS).unlink()


def ask_for_code(directory: Path, place: str) -> None:
    """As a model or a tokenizer that transformers does not know: it would need the code."""
    code = 'from pathlib import Path\nPath(__file__).with_name("ran").write_text("ran")\n'
    (directory / "evil.py").write_text(code)
    named = {"AutoConfig": "evil.C", "AutoTokenizer": [None, "evil.T"]}
    settings = dict(auto_map=named, model_type="evil", tokenizer_class="T")
    edit(directory / place, lambda content: content.update(settings))


EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
LAYER = "model.layers.1."
QUERY, DOWN = f"{LAYER}self_attn.q_proj.weight", f"{LAYER}mlp.down_proj.weight"
INV_FREQ = f"{LAYER}self_attn.rotary_emb.inv_freq"
WORDS = "tokenizer_config.json"
AUTO_MAP = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
LONG = 10**400

FILES = ["config.json", "tokenizer.json", WORDS, WEIGHTS]
_NUMBERS = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"]
_NUMBERS += ["num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"]
_WRONG = {
    "zero": 0,
    "negative": -1,
    "billions": 4 * 10**9,
    "float": 2.5,
    "whole float": 48.0,
    "text": "6",
    "true": True,
    "list": [6],
    "dict": {"a": 1},
    "nan": float("nan"),
    "infinite": float("inf"),
    "400 digits": LONG,
}

# By name: the damage, and words of the line that refuses it.
DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    **{
        f"{name} {kind}": (said(**{name: wrong}), ["config.json", name])
        for name in _NUMBERS
        for kind, wrong in _WRONG.items()
    },
    **{
        f"{name} null": (said(**{name: None}), ["config.json", name])
        for name in _NUMBERS
        if name not in ("num_key_value_heads", "head_dim")
    },
    **{
        f"epsilon {wrong!r}": (said(rms_norm_eps=wrong), ["config.json", "rms_norm_eps"])
        for wrong in (float("nan"), float("inf"), -1e-5, 0.0, 2.0, "1e-5", None, True, [1e-5])
    },
    **{
        f"rope base {wrong!r:.20}": (rope(rope_theta=wrong), ["config.json", "rope_theta"])
        for wrong in (0, -1e4, float("nan"), float("inf"), "10000", True, [1e4], LONG)
    },
    **{
        f"tied {wrong!r}": (said(tie_word_embeddings=wrong), ["tie_word_embeddings"])
        for wrong in ("false", 1, 0, [True], None)
    },
    **{
        f"eos {wrong!r:.20}": (said(eos_token_id=wrong), ["config.json", "eos_token_id"])
        for wrong in ("</s>", [0, "</s>"], -1, 1000, 2.0, True, [[0]], {"a": 0}, LONG)
    },
    "eos of generation": (
        text("generation_config.json", '{"eos_token_id": [0, 1000]}'),
        ["generation_config.json", "eos_token_id", "1000"],
    ),
    "generation config cut": (text("generation_config.json", '{"eos'), ["generation_config.json"]),
    "activation a list": (said(hidden_act=["silu"]), ["hidden_act"]),
    "model type a list": (said(model_type=["llama"]), ["config.json", "model_type"]),
    "model type unknown": (said(model_type="llama9"), ["llama9"]),
    "rope parameters text": (said(rope_parameters="default"), ["rope_parameters"]),
    "rope parameters nested": (
        said(rope_parameters={"full_attention": {"rope_theta": 5.0, "rope_type": "default"}}),
        ["full_attention"],
    ),
    "rope parameter unknown": (rope(rope_tetha=5e5), ["rope_tetha=500000.0"]),
    "dtype unknown": (said(dtype="float99"), ["float99"]),
    "heads that do not divide": (said(num_attention_heads=5, head_dim=8), ["config.json", "5"]),
    "kv heads that do not divide": (said(num_key_value_heads=4), ["6", "4"]),
    "odd heads": (said(head_dim=7), ["config.json", "head_dim", "7"]),
    # Config against weights: both numbers.
    "fewer tokens in the config": (said(vocab_size=990), ["(1000, 48)", "(990, 48)"]),
    "more tokens in the config": (said(vocab_size=1010), ["(1000, 48)", "(1010, 48)"]),
    "a padded vocabulary": (
        to(EMBEDDING, lambda w: torch.cat([w, w[:24]])),
        ["(1024, 48)", "(1000, 48)"],
    ),
    "a row short": (to(EMBEDDING, lambda w: w[:-1]), ["(999, 48)", "(1000, 48)"]),
    "more layers in the config": (said(num_hidden_layers=3), ["2 layers", "3"]),
    "fewer layers in the config": (said(num_hidden_layers=1), ["2 layers", "1"]),
    "other hidden": (said(hidden_size=96, head_dim=8), ["48", "96"]),
    "other ffn": (said(intermediate_size=90), ["96", "90"]),
    "other heads": (said(num_attention_heads=3), ["24", "48"]),
    "other kv heads": (said(num_key_value_heads=6), ["(24, 48)", "(48, 48)"]),
    "other head size": (said(head_dim=16), ["(24, 48)", "(48, 48)"]),
    "transposed": (to(DOWN, lambda w: w.t()), [DOWN, "(96, 48)", "(48, 96)"]),
    "flattened": (to(QUERY, lambda w: w.flatten()), [QUERY, "(2304,)", "(48, 48)"]),
    "a number for a norm": (to(NORM, lambda w: w[0]), [NORM, "()", "(48,)"]),
    "a norm of two dimensions": (to(NORM, lambda w: w[None]), [NORM, "(1, 48)", "(48,)"]),
    "an empty tensor": (to(DOWN, lambda w: w[:0]), [DOWN, "(0, 96)", "(48, 96)"]),
    "query bias": (added(f"{LAYER}self_attn.q_proj.bias", 48), ["q_proj.bias", "no place"]),
    "query norm": (added(f"{LAYER}self_attn.q_norm.weight", 8), ["q_norm", "no place"]),
    "an adapter's tensor": (added("adapter.weight", 3), ["adapter.weight", "no place"]),
    "untied in the config": (said(tie_word_embeddings=False), ["lm_head.weight", "tie_word_emb"]),
    "another output layer": (added("lm_head.weight", 1000, 48), ["tie_word_emb", "48000 values"]),
    "no embedding": (dropped(EMBEDDING), [EMBEDDING]),
    "no norm": (dropped(NORM), [NORM]),
    "no query": (dropped(QUERY), [QUERY]),
    "a name twice": (added("norm.weight", 48), ["norm.weight", NORM]),
    "rotary table of other heads": (added(INV_FREQ, 8), [INV_FREQ, "8 frequencies", "4"]),
    "rotary table of another base": (
        weights(lambda c: c.update({INV_FREQ: 500000.0 ** -(torch.arange(0, 8, 2) / 8)})),
        [INV_FREQ, "10000"],
    ),
    # Values.
    **{
        f"{number} in {name}": (value(name, number), [name, "1 values are NaN or infinite"])
        for number in (float("nan"), float("inf"), float("-inf"))
        for name in (EMBEDDING, QUERY, NORM)
    },
    "whole numbers": (to(DOWN, lambda w: w.to(torch.int8)), [DOWN, "I8"]),
    "booleans": (to(DOWN, lambda w: w > 0), [DOWN, "BOOL"]),
    "8-bit floats": (to(DOWN, lambda w: w.to(torch.float8_e4m3fn)), [DOWN, "F8_E4M3"]),
    # Files.
    **{
        f"{name} {kind}": (damage, [name])
        for name in FILES
        for kind, damage in {
            "empty": text(name, ""),
            "a directory": replaced(name, Path.mkdir),
            "a pipe": replaced(name, os.mkfifo),
            "cut": cut(name, 0.5),
            "cut at the end": cut(name, 0.99),
            "cut to 4 bytes": text(name, "{ \n\n"),
            "nonsense": text(name, bytes(range(256)) * 9),
            "UTF-16": text(name, '{"model_type": "llama"}'.encode("utf-16")),
            "Latin-1": text(name, b'{"name": "\xe9"}'),
            "a page": text(name, "<!DOCTYPE html><html>Sign in</html>"),
            "a list": text(name, "[1, 2]"),
            "a number": text(name, "7"),
            "null": text(name, "null"),
            "deep": text(name, DEEP),
        }.items()
    },
    **{f"{name} a pointer": (text(name, LFS), [name, "git lfs pull"]) for name in FILES},
    "a mark before the config": (text("config.json", b"\xef\xbb\xbf{}"), ["config.json", "BOM"]),
    "no directory": (shutil.rmtree, ["no such file or directory"]),
    "no directory but a file": (lambda d: shutil.rmtree(d) or d.write_text("x"), ["neither"]),
    "no config": (removed("config.json"), ["no config.json"]),
    "an empty config": (text("config.json", "{}"), ["config.json"]),
    "no tokenizer": (removed("tokenizer.json"), ["no tokenizer"]),
    "a tokenizer without a model": (text("tokenizer.json", "{}"), ["tokenizer"]),
    "a tokenizer with another model": (
        text("tokenizer.json", '{"version": "1.0", "model": {"type": "Nope"}}'),
        ["tokenizer"],
    ),
    "a tokenizer with too many tokens": (tokens(1000, 1100), ["1099", "999"]),
    "a tokenizer with one token too many": (tokens(900, 1001), ["1000", "999"]),
    "no weights": (removed(WEIGHTS), [WEIGHTS]),
    "only pickles": (renamed("pytorch_model.bin"), ["pickles", "not read"]),
    "only consolidated": (renamed("consolidated.safetensors"), ["consolidated.safetensors"]),
    "a header of no JSON": (header(lambda data: b"x" + data[1:]), [WEIGHTS]),
    "a header with other offsets": (
        header(lambda data: data.replace(b'"data_offsets":[0', b'"data_offsets":[8', 1)),
        [WEIGHTS],
    ),
    "a header with another type": (header(lambda d: d.replace(b"F32", b"F33", 1)), [WEIGHTS]),
    "a header of a petabyte": (text(WEIGHTS, struct.pack("<Q", 2**50) + b"{}"), [WEIGHTS]),
    # An index.
    "a missing shard": (sharded(lambda d, c: (d / "b.safetensors").unlink()), ["b.safetensors"]),
    "a cut shard": (sharded(lambda d, c: cut("b.safetensors", 0.7)(d)), ["b.safetensors"]),
    "a shard's pointer": (
        sharded(lambda d, c: text("a.safetensors", LFS)(d)),
        ["a.safetensors", "git lfs pull"],
    ),
    "a shard that is not named": (
        sharded(
            lambda d, c: c.update(
                weight_map={n: f for n, f in c["weight_map"].items() if f == "a.safetensors"}
            )
        ),
        ["1 layers", "2"],
    ),
    "no weight map": (sharded(lambda d, c: c.pop("weight_map")), ["index.json", "weight_map"]),
    "an empty weight map": (sharded(lambda d, c: c.update(weight_map={})), ["weight_map"]),
    "a weight map of a list": (sharded(lambda d, c: c.update(weight_map=[1])), ["weight_map"]),
    "a weight map of numbers": (sharded(lambda d, c: c["weight_map"].update(x=7)), ["7"]),
    "a shard elsewhere": (
        sharded(lambda d, c: c["weight_map"].update(x="../x.safetensors")),
        ["../x.safetensors"],
    ),
    "a shard of a pickle": (sharded(lambda d, c: c["weight_map"].update(x="x.bin")), ["x.bin"]),
    "one tensor in two shards": (
        sharded(
            lambda d, c: (
                save_file({NORM: torch.ones(48)}, d / "c.safetensors")
                or c["weight_map"].update({NORM: "c.safetensors"})
            )
        ),
        [NORM, "another file"],
    ),
    # Code.
    "code for the model": (said(auto_map=AUTO_MAP), ["config.json", "auto_map", "no code of a"]),
    "code for a pipeline": (said(custom_pipelines={"x": {"impl": "evil.X"}}), ["custom_pipelines"]),
    "code for the tokenizer": (
        said(WORDS, auto_map={"AutoTokenizer": ["evil.Slow", "evil.Fast"]}),
        [WORDS, "auto_map", "no code of a model"],
    ),
    "code for the tokenizer, listed": (said(WORDS, auto_map=["a.Slow", None]), [WORDS, "auto_map"]),
    "code from a hub": (said(auto_map={"AutoConfig": "other/repo--evil.Config"}), ["auto_map"]),
    "an adapter": (text("adapter_config.json", "{}"), ["adapter_config.json"]),
}


def gguf(**settings) -> Damage:
    """A file that says something else of the model: `settings` are of `write_gguf`."""

    def damage(directory: Path) -> None:
        from tiny_gguf import write_gguf

        (directory / GGUF).unlink()
        write_gguf(directory / "model", directory / GGUF, **settings)

    return damage


def patched(offset: int, data: bytes) -> Damage:
    """Other bytes at an offset of the file."""
    return changed(GGUF, lambda whole: whole[:offset] + data + whole[offset + len(data) :])


# Of a file beside the directory `model` that it was made from; its line names the file.
GGUF_DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    **{
        f"cut at {part}": (cut(GGUF, part), [])
        for part in (0.0001, 0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999)
    },
    "empty": (text(GGUF, ""), ["empty"]),
    "a pointer": (text(GGUF, LFS), ["git lfs pull"]),
    "a page": (text(GGUF, "<!DOCTYPE html>"), []),
    "nonsense": (text(GGUF, bytes(range(256)) * 9), []),
    "a pipe": (replaced(GGUF, os.mkfifo), []),
    "a pickle": (text(GGUF, b"PK\x03\x04" + bytes(99)), []),
    "version 9": (patched(4, struct.pack("<I", 9)), []),
    "2**60 tensors": (patched(8, struct.pack("<Q", 2**60)), []),
    "2**60 fields": (patched(16, struct.pack("<Q", 2**60)), []),
    "a name of 2**60 letters": (patched(24, struct.pack("<Q", 2**60)), []),
    "a field of an unknown type": (patched(52, struct.pack("<I", 77)), []),
    **{
        f"{name} {number}": (gguf(**{name: number}), [name])
        for name in (
            "block_count",
            "embedding_length",
            "feed_forward_length",
            "attention.head_count",
            "attention.head_count_kv",
            "context_length",
            "vocab_size",
        )
        for number in (0, 4 * 10**9)
    },
    "more layers": (gguf(block_count=3), ["2 layers", "3"]),
    "fewer layers": (gguf(block_count=1), ["2 layers", "1"]),
    "other ffn": (gguf(feed_forward_length=90), ["96", "90"]),
    "other kv heads": (gguf(**{"attention.head_count_kv": 6}), ["24", "48"]),
    "no layers said": (gguf(block_count=None), []),
    "other tokens": (gguf(vocab_size=990), ["99"]),
    "no epsilon said": (
        gguf(change=lambda writer: writer.kv_data[0].pop("llama.attention.layer_norm_rms_epsilon")),
        ["rms_norm_eps"],
    ),
    "scaled rope": (
        gguf(change=lambda writer: writer.add_string("llama.rope.scaling.type", "linear")),
        ["rope scaling 'linear'"],
    ),
    "scaled Llama-3 rope": (
        gguf(change=lambda writer: writer.add_tensor("rope_freqs.weight", torch.ones(4).numpy())),
        ["Llama-3 rope scaling"],
    ),
    "another tensor": (
        gguf(change=lambda writer: writer.add_tensor("blk.0.attn_q.bias", torch.ones(48).numpy())),
        ["layers.0.self_attn.q_proj.bias", "no place"],
    ),
}
