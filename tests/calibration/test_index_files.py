"""Index files: they come back as written, and every kind of damage is named before it is used."""

import itertools
import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from index_mutations import resign
from json_places import REMOVED, put
from toy_sums import record_of

from megatron_lowbit.calibration.costs.stored import COSTS, MISSED, SUM_COSTS
from megatron_lowbit.calibration.index import CalibrationIndex, SyncPointRecord, select_bf16_index
from megatron_lowbit.calibration.index_files import (
    FORMAT_VERSION,
    manifest_digest,
    read_index,
    write_index,
)
from megatron_lowbit.calibration.plan import Cost, Option, plan, with_feedback
from megatron_lowbit.calibration.recipe import Assignment
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.errors import IndexFileError

HIDDEN, RANKS = 256, 3


def make_index(layers: int = 2) -> CalibrationIndex:
    generator = torch.Generator().manual_seed(0)
    records = {
        layer: {
            name: record_of(torch.randn(RANKS, 9, HIDDEN, generator=generator) + 0.5, kept=2)
            for name in ("self_attention.linear_proj", "mlp.linear_fc2")
        }
        for layer in range(1, layers + 1)
    }
    manifest = {
        "model": {"num_layers": layers, "hidden_size": HIDDEN, "fingerprints": {}},
        "tp_size": RANKS,
        "codec": {"name": "rotated-hybrid", "bits": 4, "bf16_features": 2},
        "corpus": {"sha256": "0"},
    }
    return CalibrationIndex(manifest=manifest, layers=records)


@pytest.fixture
def directory(tmp_path) -> Path:
    write_index(make_index(), tmp_path / "lowbit")
    return tmp_path / "lowbit"


def test_comes_back_as_written(directory):
    index, written = read_index(directory), make_index()
    assert index.tp_size == RANKS
    assert index.manifest["format_version"] == FORMAT_VERSION
    assert sorted(p.name for p in directory.parent.iterdir()) == ["lowbit"]
    assert {path.suffix for path in directory.iterdir()} == {".json", ".safetensors"}
    for layer, records in written.layers.items():
        for name, record in records.items():
            for key, value in vars(record).items():
                back = getattr(index.record(layer, name), key)
                assert back is value is None or torch.equal(value, back)


def _with_recipe(index: CalibrationIndex) -> CalibrationIndex:
    choices = [Assignment("shaped-hybrid", bits, 2).to_json() for bits in (2, 4, 6)]
    recipe = {
        "points": {
            str(layer): dict.fromkeys(names, choices[1]) for layer, names in index.layers.items()
        },
        "options": [{"choice": c, "bits_per_value": c["bits"] + 0.2} for c in choices],
    }
    divergence = torch.tensor([0.4, 0.02, 0.001], dtype=torch.float64)
    return _changed(index, recipe, lambda layer, _: {"divergence": divergence * layer})


def _changed(
    index: CalibrationIndex, recipe: dict, costs: Callable[[int, SyncPointRecord], dict]
) -> CalibrationIndex:
    """With another recipe, and of each sync point what `costs` gives for its layer and record."""
    layers = {
        layer: {name: replace(r, **costs(layer, r)) for name, r in records.items()}
        for layer, records in index.layers.items()
    }
    return CalibrationIndex({**index.manifest, "recipe": recipe}, layers)


def test_a_recipe_and_its_options_come_back(tmp_path):
    write_index(_with_recipe(make_index()), tmp_path / "lowbit")
    index = read_index(tmp_path / "lowbit")
    assert set(index.recipe.values()) == {Assignment("shaped-hybrid", 4, 2)}
    assert sorted(index.recipe) == sorted(
        (la, n) for la, names in index.layers.items() for n in names
    )
    option = index.options()[2, "mlp.linear_fc2"][1]
    assert option == Option(Assignment("shaped-hybrid", 4, 2), 4.2, Cost(0.04))
    assert read_index(tmp_path / "lowbit").bf16_index(
        1, "mlp.linear_fc2", option.assignment.make(), 7
    ).shape == (7,)


def _of_sums(index: CalibrationIndex) -> CalibrationIndex:
    """A recipe with bits of sums of their own, and what they cost."""
    index = _with_recipe(index)
    recipe = {**index.manifest["recipe"], "feedback": True, "sum_bits_per_value": 4.2}
    pair = Assignment("shaped-hybrid", (4, 1), 2).to_json()
    recipe["points"] = {la: dict.fromkeys(names, pair) for la, names in recipe["points"].items()}
    costs = torch.tensor([0.12, 0.01, 0.001], dtype=torch.float64)
    names = (*COSTS, MISSED, *SUM_COSTS)
    return _changed(index, recipe, lambda *_: {key: costs / (1 + n) for n, key in enumerate(names)})


def test_bits_and_costs_of_sums_come_back(tmp_path):
    write_index(_of_sums(make_index()), tmp_path / "lowbit")
    index = read_index(tmp_path / "lowbit")
    assert set(index.recipe.values()) == {Assignment("shaped-hybrid", (4, 1), 2)}
    codec = index.recipe[1, "mlp.linear_fc2"].make()
    assert (codec.bits, codec.sum_bits) == (4, 1)
    first = index.options()[1, "mlp.linear_fc2"][0]
    assert first.cost == Cost(0.12, 0.12 / 2, 0.12 / 3)
    assert first.missed == 0.12 / 4
    assert first.of_sum == Cost(0.12 / 5, 0.12 / 6, 0.12 / 7)


def test_a_recipe_for_feedback_of_before_sums_is_used_as_it_is(tmp_path):
    index = _with_recipe(make_index())
    recipe = {**index.manifest["recipe"], "feedback": True}
    carried = _changed(index, recipe, lambda _, r: {"divergence_carried": r.divergence / 2})
    write_index(carried, tmp_path / "lowbit")
    index = read_index(tmp_path / "lowbit")
    assert set(index.recipe.values()) == {Assignment("shaped-hybrid", 4, 2)}
    options = index.options()
    assert options[2, "mlp.linear_fc2"][1].cost == Cost(0.04, 0.02, 0.0)
    planned = plan(with_feedback(options), 4.2, following=dict(itertools.pairwise(options)))
    assert set(planned.values()) == {Assignment("shaped-hybrid", 4, 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"missed": 1.5}, r"missed is 1.5, above 1"),
        ({"sum_handed_on": -0.5}, r"sum_handed_on is -0.5, below zero"),
        ({"handed_on": 1e300}, r"handed_on is 1e\+300, above 1e\+30"),
        ({"sum_divergence": None}, r"sum_divergence is missing"),
    ],
)
def test_impossible_costs_are_refused(tmp_path, changes, message):
    index = _of_sums(make_index())
    record = index.layers[1]["mlp.linear_fc2"]
    wrong = {
        key: None if value is None else torch.full((3,), value, dtype=torch.float64)
        for key, value in changes.items()
    }
    index.layers[1]["mlp.linear_fc2"] = replace(record, **wrong)
    write_index(index, tmp_path / "lowbit")
    with pytest.raises(IndexFileError, match=message):
        read_index(tmp_path / "lowbit")


def test_without_a_recipe_there_are_no_options(directory):
    assert read_index(directory).recipe is None
    with pytest.raises(IndexFileError, match=r"no recipe: make it with .*--budget"):
        read_index(directory).options()


def test_writing_again_replaces_it(directory):
    write_index(make_index(layers=1), directory)
    assert sorted(read_index(directory).layers) == [1]
    assert not (directory / "layer_00002.safetensors").exists()


def test_no_index_says_how_to_make_one(tmp_path):
    with pytest.raises(IndexFileError, match="no calibration index at .*lowbit calibrate --load"):
        read_index(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("layer_00002.safetensors", lambda data: data[:-5], "is damaged"),
        ("layer_00001.safetensors", lambda data: data[:-3] + b"\xff" + data[-2:], "is damaged"),
        ("layer_00002.safetensors", None, "is missing"),
        ("manifest.json", lambda data: data[:100], "is not valid JSON"),
    ],
    ids=["truncated layer", "flipped bits", "missing layer", "truncated manifest"],
)
def test_damaged_files(directory, name, damage, message):
    path = directory / name
    data = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(data))
    with pytest.raises(IndexFileError, match=f"{name} {message}"):
        read_index(directory)


def test_edited_manifest(directory):
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"tp_size": 3', '"tp_size": 2'))
    with pytest.raises(IndexFileError, match="manifest.json was changed"):
        read_index(directory)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bf16_index", torch.tensor([0, HIDDEN], dtype=torch.int32), "not ascending within 0..255"),
        ("bf16_index", torch.tensor([3, 3], dtype=torch.int32), "not ascending"),
        ("bf16_index", torch.tensor([0.5]), "not int32"),
        ("minimum", torch.full((RANKS, HIDDEN), torch.nan), "minimum is not finite"),
        ("maximum", torch.zeros(RANKS, HIDDEN - 1), r"not float32 \[3, 256\]"),
        ("mean", None, "mean is missing"),
        ("minimum", torch.full((RANKS, HIDDEN), 99.0), "minimum is above the maximum"),
        ("second_moment", torch.zeros(RANKS, HIDDEN), "second moment is below the mean's square"),
        ("maximum", torch.full((RANKS, HIDDEN), 1e20), "which no table can hold"),
        ("bf16_index", torch.tensor([3], dtype=torch.int32), "has 1 features, the manifest says 2"),
    ],
)
def test_bad_tensor_that_was_signed_again(tmp_path, key, value, message):
    """A hand-edited index whose checksums were made to fit is still not trusted."""
    index = make_index()
    record = index.layers[2]["mlp.linear_fc2"]
    object.__setattr__(record, key, value)
    if value is None:
        object.__delattr__(record, key)
    write_index(index, tmp_path / "lowbit")
    with pytest.raises(IndexFileError, match=f"layer_00002.*mlp.linear_fc2/.*{message}"):
        read_index(tmp_path / "lowbit")


_POINT = "recipe/points/1/mlp.linear_fc2"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (f"{_POINT}/bf16_features", -1, "greater than or equal to 0 .-1"),
        (f"{_POINT}/bf16_features", 257, "bf16_features 257: a token has 256 features"),
        (f"{_POINT}/bf16_features", 2.0, "valid integer .2.0"),
        (f"{_POINT}/bits", 4.0, "4.0 is neither 0 to 16 bits nor a list of two"),
        (f"{_POINT}/bits", "4", "'4' is neither"),
        (f"{_POINT}/bits", True, "True is neither"),
        (f"{_POINT}/bits", [4], "is neither"),
        (f"{_POINT}/bits", 9, "no 9-bit version"),
        (f"{_POINT}/codec", "native", "unknown codec 'native'"),
        (_POINT, {"bits": 4}, "codec: Field required"),
        (_POINT, {"codec": "mp3"}, "unknown codec 'mp3'"),
        (f"{_POINT}/extra", 1, "Extra inputs"),
        ("recipe/options/0/bits_per_value", -1.0, "greater than or equal to 0"),
        ("recipe/options/0/bits_per_value", "4", "valid number"),
        ("recipe/options", [], "recipe.*options"),
        ("recipe/options/2", REMOVED, r"divergence is torch.float64 \[3\], not float64 \[2\]"),
        ("recipe/points", [], "recipe.points: .*valid dictionary"),
        ("recipe/points/²", {}, "match pattern"),
        ("recipe/points/01", {}, "match pattern"),
        ("recipe/points/3", {}, "not the sync points that the layers' files have"),
        ("recipe/points/1/a\0b", {"codec": "bf16"}, "control character"),
        ("model/num_layers", 50_000_000, "less than or equal to 16384"),
        ("model/num_layers", 16_384, "lists layers 1, 2, not 1 to 16384"),
        ("model/num_layers", 2.0, "valid integer"),
        ("model/hidden_size", 0, "greater than or equal to 1"),
        ("model/hidden_size", True, "valid integer"),
        ("tp_size", 10**9, "less than or equal to"),
        ("tp_size", "3", r"tp_size: Input should be a valid integer \('3'\)"),
        ("tp_size", 2, r"layer_00001.*float32 \[3, 256\], not float32 \[2, 256\]"),
        ("codec", 3, "codec: Input should be a valid dictionary"),
        ("codec/name", "mp3", "codec 'mp3'"),
        ("codec/bits", 4.0, "valid integer"),
        ("codec/bits", False, "valid integer"),
        ("codec/bf16_features", 257, "a token has 256 features"),
        ("codec/bf16_features", 3, "has 2 features, the manifest says 3"),
        ("layers/01", {}, "match pattern"),
        ("layers/one", {}, r"layers\.one.*should match pattern"),
        ("layers/²", {}, "match pattern"),
        ("layers/2/file", "layer_00001.safetensors", "layers.2.file is .* not layer_00002"),
        ("layers/2/file", "../layer_00002.safetensors", "layers.2.file is"),
        ("layers/2/file", "a\0b", "control character"),
        ("layers/2/sha256", "0", "match pattern"),
        ("format_version", FORMAT_VERSION + 1, "version 4, this release reads 3: update"),
        ("format_version", 1, "format version 1, of an older release"),
        ("format_version", None, "no format_version"),
        ("format_version", True, "no format_version"),
        ("format_version", 3.0, "no format_version"),
        ("versions", [], "valid dictionary"),
    ],
)
def test_values_behind_the_checksums_are_not_believed(tmp_path, place, value, message):
    """The path of the bad value is in the message, but for the words of older checks."""
    older = ("format_version", "codec/bf16_features", "recipe/options/2")
    directory = tmp_path / "lowbit"
    write_index(_with_recipe(make_index()), directory)
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    put(manifest, place, value)
    manifest["sha256"] = manifest_digest(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(IndexFileError, match=message) as error:
        read_index(directory)
    text = str(error.value)
    remedy = "update megatron_lowbit" if "update" in message else "megatron_lowbit calibrate"
    assert text.isprintable() and text.endswith(remedy)
    # A `tp_size` of 2 is told from a layer's file.
    if "\0" not in place and place not in older and (place, value) != ("tp_size", 2):
        assert place.partition("/")[0] in text


@pytest.mark.parametrize("name", ["manifest.json", "layer_00002.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
def test_what_is_no_file_does_not_hang(directory, name, kind):
    path = directory / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(IndexFileError, match=f"{name} is not a regular file.*lowbit calibrate"):
        read_index(directory)


def test_another_layers_file_under_this_layers_name(directory):
    data = (directory / "layer_00001.safetensors").read_bytes()
    (directory / "layer_00002.safetensors").write_bytes(data)
    resign(directory)
    with pytest.raises(IndexFileError, match=r"layer_00002.* is of layer '1', not of layer 2"):
        read_index(directory)


def test_an_index_of_before_that_does_not_say_its_layers(directory):
    """Format 3 had no numbers in the layers' files; it is read all the same."""
    for path in directory.glob("*.safetensors"):
        path.write_bytes(safetensors.torch.save(safetensors.torch.load(path.read_bytes())))
    resign(directory)
    assert sorted(read_index(directory).layers) == [1, 2]


def test_not_safetensors_but_signed(directory):
    (directory / "layer_00001.safetensors").write_bytes(b"garbage!" * 4)
    resign(directory)
    with pytest.raises(IndexFileError, match="layer_00001.safetensors is not a safetensors file"):
        read_index(directory)


def test_a_full_disk_leaves_the_old_index_and_names_the_file(directory):
    """A file size limit stands in for a full disk: the same OSError from the same write."""
    before = sorted(directory.iterdir())
    child = os.fork()
    if child == 0:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_index(make_index(layers=5), directory)
        except OSError as error:
            os._exit(0 if "layer_00001.safetensors" in str(error) else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sorted(directory.iterdir()) == before
    assert sorted(p.name for p in directory.parent.iterdir()) == ["lowbit"]
    assert sorted(read_index(directory).layers) == [1, 2]


@pytest.mark.parametrize("content", ["a file", "a directory of something else"])
def test_what_is_not_an_index_is_not_replaced(tmp_path, content):
    target = tmp_path / "thesis"
    if content == "a file":
        target.write_text("years of work")
    else:
        target.mkdir()
        (target / "manifest.json").write_text("{}")  # of a browser extension, say
        (target / "chapter1.txt").write_text("years of work")
    with pytest.raises(IndexFileError, match="thesis exists and is not a calibration index"):
        write_index(make_index(), target)
    assert "years of work" in (target if target.is_file() else target / "chapter1.txt").read_text()


def test_an_interrupted_write_leaves_the_old_index(directory, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_index(make_index(layers=5), directory)
    assert sorted(p.name for p in directory.parent.iterdir()) == ["lowbit"]
    assert sorted(read_index(directory).layers) == [1, 2]


def test_tables_for_the_calibrated_and_for_another_codec(directory):
    index = read_index(directory)
    rotated = index.tables(1, "mlp.linear_fc2", get_codec("rotated-hybrid"), ranks=RANKS)
    stored = index.record(1, "mlp.linear_fc2").bf16_index
    assert rotated.bf16_index.tolist() == stored.tolist()
    static = index.tables(1, "mlp.linear_fc2", get_codec("static-hybrid"), ranks=RANKS)
    assert static.bf16_index.numel() == HIDDEN // 64
    assert set(stored.tolist()) <= set(static.bf16_index.tolist())
    assert static.scale.shape == (RANKS, HIDDEN)
    with pytest.raises(IndexFileError, match="no entry for layer 9 mlp.linear_fc2"):
        index.tables(9, "mlp.linear_fc2", get_codec("rotated-hybrid"), ranks=RANKS)


@pytest.mark.parametrize(("ranks", "known"), [(3, True), (1, True), (2, False), (6, False)])
def test_means_serve_the_tp_sizes_that_divide_the_calibrated_one(directory, ranks, known):
    index = read_index(directory)
    record = index.record(1, "mlp.linear_fc2")
    tables = index.tables(1, "mlp.linear_fc2", get_codec("shaped-hybrid"), ranks=ranks)
    if not known:
        assert tables.center is None
        return
    expected = record.mean if ranks == RANKS else record.mean.sum(dim=0, keepdim=True)
    expected = expected.clone()
    expected[:, tables.bf16_index] = 0
    assert torch.equal(tables.center, expected)


def test_selection_takes_the_largest_sum_over_ranks():
    ranges = torch.tensor([[1.0, 5.0, 2.0, 2.0], [4.0, 1.0, 2.0, 2.0]])
    assert select_bf16_index(ranges, 2).tolist() == [0, 1]
    assert select_bf16_index(ranges, 3).tolist() == [0, 1, 2]  # of equals the first
    assert select_bf16_index(ranges, 0).tolist() == []
