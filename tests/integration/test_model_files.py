"""What is read of a model's directory: what transformers reads, and nothing of it is run."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from damaged_models import WEIGHTS, ask_for_code, edit, shard, value, weights  # noqa: E402
from releases import ROOT, run  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_llama import SHAPE  # noqa: E402
from tiny_models import MODELS  # noqa: E402

from megatron_lowbit.errors import LowbitError  # noqa: E402
from megatron_lowbit.files import atomic_directory, write_atomic  # noqa: E402
from megatron_lowbit.integration.convert import hf_source, parameters, translate  # noqa: E402
from megatron_lowbit.integration.convert.families import Architecture  # noqa: E402
from megatron_lowbit.integration.convert.weights import open_weights  # noqa: E402

CONVERT = ROOT / "tools" / "convert_hf.py"


@pytest.fixture
def model(whole, tmp_path) -> Path:
    """A copy of a tied Llama."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def wrong_weights(model: Path, name: str) -> None:
    """A file that must not be read: all names, all zeros."""
    zeros = {key: torch.zeros_like(tensor) for key, tensor in load_file(model / WEIGHTS).items()}
    save_file(zeros, model / name)


def renamed(change):
    """Other names for the tensors."""

    def damage(model: Path) -> None:
        content = {change(name): tensor for name, tensor in load_file(model / WEIGHTS).items()}
        save_file(content, model / WEIGHTS)

    return damage


def whole_and_index(model: Path) -> None:
    shutil.copy(model / WEIGHTS, model / "kept")
    wrong_weights(model, WEIGHTS)
    shard(model)
    (model / "kept").rename(model / WEIGHTS)


def shards_and_others(model: Path) -> None:
    wrong_weights(model, "zz.safetensors")
    wrong_weights(model, "model-00001-of-00009.safetensors")
    shard(model, ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"))


# Directories as they are found, each of the same model.
LAYOUTS = {
    "one file": lambda model: None,
    "with Mistral's own file": lambda model: wrong_weights(model, "consolidated.safetensors"),
    "with another precision's file": lambda model: wrong_weights(model, "model.fp16.safetensors"),
    "with a pickle": lambda model: (model / "pytorch_model.bin").write_bytes(b"not read"),
    "two files and an index": shard,
    "an index and files that it does not name": shards_and_others,
    "an index and the whole": whole_and_index,
    "a tied model with only its output layer": renamed(
        lambda name: name.replace("model.embed_tokens.weight", "lm_head.weight")
    ),
    "a tied model with both": weights(
        lambda c: c.update({"lm_head.weight": c["model.embed_tokens.weight"].clone()})
    ),
    "saved without its head": renamed(lambda name: name.removeprefix("model.")),
    "saved within another model": renamed(lambda name: f"model.{name}"),
    "linked files": lambda model: (
        (model / WEIGHTS).rename(model.parent / "blob"),
        (model / WEIGHTS).symlink_to(model.parent / "blob"),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_files_and_names_are_read_as_by_transformers(model, name):
    LAYOUTS[name](model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    arch = hf_source.read_config(model)
    with open_weights(model, arch) as get:
        ours = {name: get(name) for name in theirs if name != "lm_head.weight"}
    assert set(ours) | {"lm_head.weight"} == set(parameters.shapes_of(arch))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["model.norm.weight"].abs().sum() > 0


@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_the_parameters_that_transformers_makes(name):
    config, special = MODELS[name]
    made = config(**{**SHAPE, **special})
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(made).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert parameters.shapes_of(Architecture.of(made)) == expected


@pytest.mark.parametrize(
    ("number", "dtype", "words"),
    [
        (1e5, "fp16", ["100000", "float16 ends at 65504"]),
        (-7e4, "fp16", ["70000", "float16"]),
        (65519.0, "fp16", []),
        (1e5, "bf16", []),
        (3.4e38, "bf16", ["3.4e+38", "bfloat16"]),
        (3.4e38, "fp32", []),
    ],
)
def test_weights_that_the_dtype_cannot_hold_are_named(model, number, dtype, words):
    name = "model.layers.0.mlp.up_proj.weight"
    value(name, number)(model)
    with open_weights(model, hf_source.read_config(model), translate.DTYPES[dtype]) as get:
        if not words:
            assert get(name).view(-1)[7] == torch.tensor(number)
            return
        with pytest.raises(LowbitError) as caught:
            get(name)
    assert all(word in str(caught.value) for word in [name, "--dtype", *words]), caught.value


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_not_run_and_nothing_is_asked(model, place):
    """In a process of its own, with an answer ready."""
    ask_for_code(model, place)
    command = [CONVERT, "--model", model, "--save", model / "out"]
    done = run(sys.executable, *command, input="y\n" * 9, status=1)
    (line,) = done.stderr.splitlines()
    assert "no code of a model is ever run" in line and place in line
    assert not done.stdout and not list(model.rglob("ran")) and not (model / "out").exists()


def test_what_lies_beside_a_gguf_file_is_not_read(model, monkeypatch):
    pytest.importorskip("gguf")
    from tiny_gguf import write_gguf

    write_gguf(model, model / "tiny.gguf")
    alone = Path(shutil.copy(model / "tiny.gguf", model.with_name("alone.gguf")))
    ask_for_code(model, "config.json")
    ask_for_code(model, "tokenizer_config.json")
    edit(model / "tokenizer.json", lambda c: c["model"]["vocab"].update({"Ġ": 998}))
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail(f"asked: {text}"))
    read = [hf_source.load_tokenizer(path, 1000) for path in (model / "tiny.gguf", alone)]
    assert read[0].get_vocab() == read[1].get_vocab()
    assert hf_source.read_config(model / "tiny.gguf") == hf_source.read_config(alone)
    assert not list(model.rglob("ran"))


def test_nan_in_the_last_weight_leaves_no_checkpoint(model):
    """The command line as such, Megatron and all."""
    value("model.layers.1.mlp.down_proj.weight", float("nan"))(model)
    command = [CONVERT, "--model", model, "--save", model.with_name("out")]
    done = run(sys.executable, *command, status=1)
    assert "Traceback" not in done.stderr
    assert "layers.1.mlp.down_proj.weight: 1 values are NaN" in done.stderr.splitlines()[-1]
    assert [path.name for path in model.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        ({"eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": [7, 0, 7]}, {}, (7, 0)),
        ({"eos_token_id": 7}, {"eos_token_id": [0, 551]}, (0, 551)),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 0}, (0,)),
        ({"eos_token_id": 7}, {"eos_token_id": None}, (7,)),
        ({"eos_token_id": None}, None, ()),
    ],
)
def test_the_tokens_that_end_a_text_are_kept(model, config, generation, stops):
    edit(model / "config.json", lambda content: content.update(config))
    (model / "generation_config.json").unlink()
    if generation is not None:
        (model / "generation_config.json").write_text(json.dumps(generation))
    arch = hf_source.read_config(model)
    assert arch.stops == stops
    args = translate.megatron_args(arch, ranks=1, dtype="bf16", tokenizer=model)
    assert args.eos_token_ids == (list(stops) or None)


def test_a_link_to_a_directory_is_filled_and_stays_a_link(tmp_path):
    disk = tmp_path / "disk" / "ckpt"
    disk.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(disk)
    for content in ("old", "new"):
        with atomic_directory(link) as staging:
            (staging / "file").write_text(content)
        assert link.is_symlink() and os.readlink(link) == str(disk)
        assert (disk / "file").read_text() == content
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["ckpt", "disk", "file", "link"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda link: link.symlink_to(link.with_name("gone")),
            "link to .*gone, which is not there",
        ),
        (lambda link: link.symlink_to(link), "link to .*, which is not there"),
        (lambda link: link.symlink_to(__file__), "not a directory"),
        (lambda link: link.write_text("x"), "not a directory"),
        (lambda link: link.symlink_to("/"), "a disk is mounted there"),
    ],
)
def test_a_link_to_nowhere_or_to_a_file_is_one_line(tmp_path, make, words):
    make(tmp_path / "link")
    before = os.listdir(tmp_path)
    with pytest.raises(LowbitError, match=words), atomic_directory(tmp_path / "link"):
        pass
    assert os.listdir(tmp_path) == before


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "disk" / "there.json")
    for content in (b"old", b"new"):
        write_atomic(tmp_path / "link.json", content)
        assert (tmp_path / "link.json").is_symlink()
        assert (tmp_path / "disk" / "there.json").read_bytes() == content
