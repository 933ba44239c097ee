"""The low-bit arguments: what they mean, and what is refused before a checkpoint is loaded."""

import argparse
from pathlib import Path

import pytest

from megatron_lowbit.comm.policy.policy import Settings
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.arguments import (
    add_lowbit_args,
    completed,
    index_dir_from_args,
    parse_bits,
    settings_from_args,
)

ON = ["--lowbit-tp-comm", "x", "--lowbit-collective"]


def _parse(*argv: str) -> argparse.Namespace:
    return add_lowbit_args(argparse.ArgumentParser()).parse_args(argv)


def test_nothing_is_on_without_the_flag():
    assert index_dir_from_args(_parse()) is None


def test_settings():
    assert settings_from_args(_parse()) == Settings("auto")
    args = _parse("--lowbit-tuning", "t.json", "--lowbit-node-size", "4")
    assert settings_from_args(args) == Settings("auto", tuning=Path("t.json"), node_size=4)
    args = _parse("--lowbit-collective", "hierarchical", "--lowbit-inside-node", "low-bit")
    assert settings_from_args(args) == Settings("hierarchical", low_bit_inside=True)


def test_bits():
    assert parse_bits(None) is None
    assert parse_bits("3") == 3
    assert parse_bits("4,6") == (4, 6)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lowbit-bits", "4"], "--lowbit-bits does nothing without --lowbit-tp-comm"),
        (["--lowbit-stats", "f"], "--lowbit-stats does nothing without"),
        (["--lowbit-no-feedback"], "--lowbit-no-feedback does nothing without --lowbit-tp-comm"),
        (["--lowbit-collective", "auto"], "--lowbit-collective does nothing without"),
        (["--lowbit-tp-comm", "x", "--lowbit-bits", "4,6,8"], "4,6,8: give one number, or two"),
        (["--lowbit-tp-comm", "x", "--lowbit-bits", "four"], "--lowbit-bits four: not a positive"),
        (["--lowbit-tp-comm", "x", "--lowbit-bits", "4,"], "not a positive whole number"),
        (["--lowbit-tp-comm", "x", "--lowbit-collective", "ring"], "unknown collective 'ring'"),
        (["--lowbit-tp-comm", "x", "--lowbit-node-size", "0"], "--lowbit-node-size 0: not"),
        (["--lowbit-tp-comm", "x", "--lowbit-inside-node", "fp8"], "choose bf16 or low-bit"),
        (["--lowbit-tp-comm", "x", "--lowbit-all-gather", "9"], "no 9-bit version"),
        (["--lowbit-tp-comm", "x", "--lowbit-experts", "9"], "no 9-bit version"),
        (["--lowbit-tp-comm", "x", "--lowbit-stats", "/dev/null/f.json"], "/dev/null"),
        (["--lowbit-tp-comm", "x", "--lowbit-stats", "/dev"], "/dev is a directory: name a file"),
        (["--lowbit-tp-comm", "x", "--lowbit-stats", "/dev/null"], "/dev/null is no regular file"),
        (["--lowbit-tp-comm", "x"], "no calibration index at x"),
        ([*ON, "native", "--lowbit-codec", "mxfp4"], "--lowbit-codec means nothing to native"),
        ([*ON, "native", "--lowbit-bits", "4"], "--lowbit-bits means nothing to native"),
        ([*ON, "native", "--lowbit-no-feedback"], "--lowbit-no-feedback means nothing to native"),
        ([*ON, "native", "--lowbit-recipe", "f"], "--lowbit-recipe means nothing to native"),
        ([*ON, "one-shot", "--lowbit-bits", "4,6"], "4,6: one-shot sends no sums: give one"),
        ([*ON, "one-shot", "--lowbit-inside-node", "bf16"], "inside-node means nothing to one"),
        ([*ON, "one-shot", "--lowbit-tuning", "t"], "a tuning file means nothing to one-shot"),
        ([*ON, "two-shot", "--lowbit-node-size", "2"], "nodes mean nothing to two-shot"),
        ([*ON, "auto", "--lowbit-codec", "mxfp4", "--lowbit-bits", "4"], "mxfp4 has a fixed num"),
    ],
)
def test_refused(argv, message):
    with pytest.raises((LowbitError, OSError), match=message):
        index_dir_from_args(_parse(*argv))


def test_arguments_that_come_from_a_yaml_file_are_completed_and_typed():
    args = completed(argparse.Namespace(lowbit_tp_comm=True, lowbit_node_size=2, load="c"))
    assert (args.lowbit_tp_comm, args.lowbit_node_size, args.lowbit_codec) == ("", "2", None)
    assert completed(argparse.Namespace(lowbit_tp_comm=False)).lowbit_tp_comm is None
    for wrong, message in (
        ({"lowbit_tp_com": ""}, "lowbit_tp_com is no low-bit argument: choose from lowbit_tp_comm"),
        ({"lowbit_bits": [4, 6]}, "is a list: give a text"),
        ({"lowbit_codec": True}, "lowbit_codec: True is a bool: give a text"),
        ({"lowbit_bits": 4.5}, "is a float: give a text"),
    ):
        with pytest.raises(LowbitError, match=message):
            completed(argparse.Namespace(**wrong))


def test_an_all_gather_needs_sequence_parallelism():
    args = _parse("--lowbit-tp-comm", "x", "--lowbit-all-gather", "6")
    args.sequence_parallel = False  # as Megatron's parser has it
    with pytest.raises(LowbitError, match="means nothing without --sequence-parallel"):
        index_dir_from_args(args)
