"""Codecs of other packages: found by name, checked by the contract, refused in one line."""

import json
import re
import sys

import pytest
import torch
from cases import all_codecs
from foreign_package import NAME, example

from megatron_lowbit import kernels
from megatron_lowbit.benchmark.collectives.correctness import sqnr_floor
from megatron_lowbit.calibration.recipe import Assignment, read_rules
from megatron_lowbit.codecs import CODECS, check_codec, codec_names, get_codec, parse_codec
from megatron_lowbit.codecs.foreign.contract import CHECKS
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.variants import parse_variant

FOREIGN = f"codec '{NAME}' of the package acme 1.2 (acme_codecs:Int6Token)"


def test_the_example_of_the_page_is_found_by_its_name_and_passes(installed):
    installed(example())
    for bits in ((6, 6), (4, 4), (4, 6)):
        codec = get_codec(NAME, bits=bits)
        assert (codec.name, codec.bits, codec.sum_bits) == (NAME, *bits)
        check_codec(codec)
        assert sqnr_floor(codec) >= 14
    assert repr(parse_codec(NAME)) == f"{NAME} (6 bits)"
    assert repr(parse_codec(f"{NAME}-4+6")) == f"{NAME} (4+6 bits)"
    variant = parse_variant(f"{NAME}-4@feedback@two-shot")
    assert (repr(variant.codec), variant.has_feedback) == (f"{NAME} (4 bits)", True)
    assert codec_names() == [*CODECS, NAME]
    tables = get_codec(NAME).tables(4096)
    assert 8 * get_codec(NAME).row_bytes(tables) / 4096 == pytest.approx(6.01, abs=0.005)
    with pytest.raises(LowbitError, match=f"{NAME} has no 5-bit version: choose from 6, 4"):
        get_codec(NAME, bits=5)


def test_recipes_take_it(installed, tmp_path):
    installed(example())
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([{"match": "1.*", "codec": NAME, "bits": 4}]))
    assert read_rules(rules)[0]["codec"] == NAME
    assert repr(Assignment(NAME, 4).make()) == f"{NAME} (4 bits)"
    rules.write_text(json.dumps([{"match": "1.*", "codec": NAME, "bits": 3}]))
    with pytest.raises(LowbitError, match=f"rules.json, rule 1: codec {NAME} has no 3-bit"):
        read_rules(rules)
    rules.write_text(json.dumps([{"match": "1.*", "codec": "acme"}]))
    with pytest.raises(LowbitError, match=f"unknown codec 'acme': choose one of native, .*{NAME}"):
        read_rules(rules)


def test_nothing_is_imported_before_its_name_is_asked_for(installed):
    installed(example())
    get_codec("rotated-hybrid")
    with pytest.raises(LowbitError, match=f"unknown codec 'mp3': .*, {NAME}; or install the pack"):
        get_codec("mp3")
    assert "acme_codecs" not in sys.modules
    get_codec(NAME)
    assert "acme_codecs" in sys.modules


def test_a_name_of_two_packages_is_nobodys(installed):
    installed(example())
    installed(example(), package="other")
    message = f"codec '{NAME}' is declared by acme 1.2 and other 1.2: uninstall all but one"
    with pytest.raises(LowbitError, match=message):
        get_codec(NAME)
    assert "acme_codecs" not in sys.modules


def test_a_name_of_ours_is_refused_and_the_others_work(installed):
    installed(example(), names=("rotated-hybrid", NAME))
    with pytest.raises(LowbitError, match="'rotated-hybrid' is ours, and the package acme 1.2 de"):
        get_codec("rotated-hybrid")
    assert get_codec("shaped-hybrid").name == "shaped-hybrid"
    assert get_codec(NAME).name == NAME


@pytest.mark.parametrize("name", ["native", "recipe", "int4", "a@b", "Acme", "try-vector"])
def test_a_name_that_means_something_else_is_refused(installed, name):
    installed(example(), names=(name,))
    with pytest.raises(
        LowbitError, match=f"codec '{name}' of the package acme .* cannot have this"
    ):
        get_codec(name)
    assert "acme_codecs" not in sys.modules


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (("import torch", "import no_such"), "Int6Token", "cannot be imported: ModuleNotFoundErr"),
        (("import torch", "raise SystemExit(3)"), "Int6Token", "cannot be imported: SystemExit: 3"),
        (("class ", "class _"), "Int6Token", "cannot be imported: AttributeError: "),
        (("class ", "class "), "pack", "is no class derived from codecs.Codec: <function pack"),
        ((NAME, "other"), "Int6Token", "calls itself 'other': its name and the entry point's"),
        (("def row_bytes", "def rows"), "Int6Token", "cannot be made with .*: TypeError: .*abstr"),
        (
            ("    def row_bytes", "    def __init__(self): ...\n\n    def row_bytes"),
            "Int6Token",
            "cannot be made with .bits, sum_bits=....*TypeError: ",
        ),
    ],
)
def test_what_cannot_be_loaded_is_one_line(installed, change, kind, message):
    installed(example().replace(*change), kind=kind)
    with pytest.raises(LowbitError) as error:
        get_codec(NAME)
    expected = FOREIGN.replace("Int6Token", kind)
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)
    assert re.search(message, str(error.value))


SCALE = "values.abs().amax(dim=1, keepdim=True)"
# Check -> what in the example is replaced by what, which breaks it.
BROKEN = {
    "attributes": ("(6, 4)  #", "[6, 4]  #"),
    "tables": (
        "    def row",
        "    def tables(self, *args, **kwargs):\n        pass\n\n    def row",
    ),
    "row bytes": ("self.bits) + 4\n", "self.bits) + 4.0\n"),
    "payload": (".view(torch.uint8).view(-1, 4)], dim=1)", ".view(torch.uint8).view(-1, 4)])"),
    "sum": ("rounded_into(out, sum_in_rank_order(values))", "sum_in_rank_order(values)"),
    "accuracy": ("sum_in_rank_order(values)", "sum_in_rank_order(values[:1])"),
    "input stays": ("partial.float()", "partial.mul_(0.5).float()"),
    "determinism": ("round()", "add_(torch.rand_like(values) - 0.5).round()"),
    "strides": ("partial.float()", "partial.view(-1).view(partial.shape).float()"),
    "independent tokens": (SCALE, "(values.abs().sum() / 20).expand(len(values), 1)"),
    "non-finite values": ("partial.float()", "partial.float().nan_to_num(0, 1, -1)"),
    "error feedback": (
        "    @property",
        "    def encode_with_carry(self, partial, tables, carry, *, rank=0):\n"
        "        return self.encode(partial, tables, rank=rank)\n\n    @property",
    ),
    "sum quantized again": (
        "    @property",
        "    def reduce_encode(self, payloads, tables):\n"
        "        total = self.decode_sum(payloads, tables)\n"
        "        return self.encode(total, tables)\n\n    @property",
    ),
}


def test_there_is_a_broken_codec_for_every_check():
    assert list(BROKEN) == list(CHECKS)


@pytest.mark.parametrize("check", BROKEN)
def test_a_codec_that_breaks_the_contract_is_refused_when_it_is_loaded(installed, check):
    assert BROKEN[check][0] in example()
    installed(example().replace(*BROKEN[check]))
    with pytest.raises(LowbitError) as error:
        get_codec(NAME, bits=(4, 6))
    message = str(error.value)
    assert message.startswith(f"codec {NAME} (4+6 bits) breaks the contract, check '{check}' (hid")
    assert message.endswith(CHECKS[check][1]) and "\n" not in message


@pytest.mark.parametrize("codec", all_codecs(), ids=repr)
def test_our_own_pass(codec):
    check_codec(codec, quick=True)
    with kernels.disabled(), torch.inference_mode():
        check_codec(codec, quick=True)


@pytest.mark.parametrize("name", ["static-hybrid", "spike-g32"])
def test_our_own_pass_all_of_it(name):
    check_codec(get_codec(name))
