"""The doctor: what it says of times, that it checks bits, what it refuses, and a run over ranks."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_each_rank

from megatron_lowbit.benchmark.collectives.ranks import plain_ranks
from megatron_lowbit.benchmark.doctor.doctor_advice import (
    advice,
    expected,
    passes,
    table,
    undecided,
    unsure,
)
from megatron_lowbit.benchmark.doctor.doctor_checks import check_bits
from megatron_lowbit.benchmark.doctor.doctor_command import main
from megatron_lowbit.benchmark.doctor.doctor_trial import Verdict
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.codecs.rotated_hybrid import RotatedHybrid
from megatron_lowbit.comm.policy.timings import ByTimes, Case, Kind, Timings
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels.switches import is_disabled

TOOL = Path(__file__).resolve().parents[2] / "tools" / "doctor.py"
HIDDEN = 512
ROW = 2 * HIDDEN
SIZES = [ROW << 2 * n for n in range(6)]  # 1 to 1024 tokens
NATIVE = [1.0, 1.0, 1.0, 2.0, 8.0, 30.0]
LATE = [2.0, 2.0, 2.0, 3.0, 4.0, 10.0]  # faster from 256 tokens on


def times_of(low: list[float], count: int = 10) -> ByTimes:
    codec = get_codec()
    kind = Kind(codec, codec.tables(HIDDEN), count, carries=True)
    cases = {Case("", False, "native"): NATIVE, kind.case("two-shot"): low}
    by_case = {
        case: {size: (ms,) * 6 for size, ms in zip(SIZES, each, strict=True)}
        for case, each in cases.items()
    }
    return ByTimes(Timings(by_case), [kind], ["two-shot"], source="a test")


def test_passes_of_a_model():
    found = passes(times_of(LATE), HIDDEN, longest=2048)
    assert [one.name for one in found] == [
        "decode, 1 sequence",
        "decode, 16 sequences",
        "decode, 64 sequences",
        "prefill, 256 tokens",
        "prefill, 1024 tokens",
    ]
    assert [one.taken for one in found] == ["native"] * 3 + ["two-shot"] * 2
    assert found[-1].ms == {"native": 300.0, "two-shot": 100.0}
    assert found[-1].speedup == 3.0
    assert [one.tokens for one in passes(times_of(LATE), HIDDEN, longest=100)][3:] == [100]


def test_skipped_sync_points_cost_native_alone():
    plain, skipping = (passes(times_of(LATE), HIDDEN, 256, skipped=n)[0] for n in (0, 10))
    assert (plain.taken, plain.speedup) == ("native", 1.0)
    assert (skipping.taken, skipping.speedup) == ("native", 2.0)
    assert skipping.ms["native"] == 2 * plain.ms["native"]


def test_what_may_gain_gains_with_skipped_sync_points_more():
    times = times_of([1.0, 1.0, 1.0, 2.0, 8.0, 30.0])
    plain, skipping = (passes(times, HIDDEN, 256, skipped=n)[0].perhaps for n in (0, 10))
    assert plain == {"two-shot": pytest.approx(0.9)}
    assert skipping == {"two-shot": pytest.approx(0.45)}


def test_what_is_longer_than_timed_is_said():
    lines = table(passes(times_of(LATE), HIDDEN, longest=4096))
    assert lines[0].split() == "pass message native two-shot auto takes".split()
    assert "two-shot, 3.00x" in lines[-2] and "timed" not in lines[-2]
    assert lines[-1].endswith("two-shot, 3.00x (longer than what was timed)")


def test_what_scatters_is_said():
    times = times_of([5 * ms for ms in NATIVE])
    low = times.timings.times[times.kinds[0].case("two-shot")]
    low[SIZES[2]] = (0.5, 0.5, 0.5, 0.5, 0.5, 9.0)  # 16 tokens: of six rounds the worst counts
    found = passes(times, HIDDEN, longest=1024)
    perhaps = "two-shot perhaps up to 2.22x"
    assert [unsure(one.perhaps) for one in found] == ["", perhaps, "", "", ""]
    assert table(found)[2].endswith(f"  native ({perhaps})")
    said = advice(found, None, None)
    assert said[0].startswith("Leave low bits off here")
    assert said[1] == "Not surely decided: decode, 16 sequences. More --seconds may tell."
    assert not undecided(passes(times_of(LATE), HIDDEN, longest=1024))


def test_what_is_longer_than_timed_is_not_decided():
    """Unless low bits are taken there, which is by what each byte more takes."""
    slow = passes(times_of([5 * ms for ms in NATIVE]), HIDDEN, longest=4096)
    assert undecided(slow) == ["Not surely decided: prefill, 4096 tokens. More --seconds may tell."]
    assert not undecided(passes(times_of(LATE), HIDDEN, longest=4096))


def test_expected_times_are_those_of_sums():
    first, token, note = expected(passes(times_of(LATE), HIDDEN, longest=1024))
    assert first == "time to first token, 1024 tokens: 300 ms in native sums, 100 ms by auto"
    assert token == "time per token, one sequence: 10 ms in native sums, 10 ms by auto"
    assert note.startswith("(sums alone, codecs included;")


@pytest.mark.parametrize(
    ("low", "calibrate", "said", "not_said"),
    [
        (LATE, None, "flags:  --lowbit-tp-comm --lowbit-tuning t.json", "--lowbit-collective"),
        (LATE, None, "prefill, 1024 tokens 3.0x by two-shot", "Leave low bits off"),
        (LATE, None, "auto keeps native: decode, 1 sequence; decode, 16", "first:"),
        (LATE, "calibrate it", "first:  calibrate it", "Leave"),
        ([5 * ms for ms in NATIVE], None, "Leave low bits off here", "flags"),
        ([0.5 * ms for ms in NATIVE], None, "--lowbit-collective two-shot    (the same", "keeps"),
    ],
)
def test_advice(low, calibrate, said, not_said):
    text = "\n".join(advice(passes(times_of(low), HIDDEN, 1024), "t.json", calibrate))
    assert said in text and not_said not in text


def test_advice_where_only_skipping_gains():
    found = passes(times_of([5 * ms for ms in NATIVE]), HIDDEN, 1024, skipped=5)
    assert "only what the skipped sync points save" in advice(found, None, None)[0]


PERHAPS = {"one-shot": 0.8}


@pytest.mark.parametrize(
    ("taken", "perhaps", "one_shot", "two_shot", "word"),
    [
        ("native", {}, [1.05, 1.11], [0.5, 0.6], "right"),
        ("native", PERHAPS, [1.05, 1.11], [0.5, 0.6], "right"),
        ("native", {}, [1.5, 1.12], [0.5, 0.6], "missed"),
        ("native", PERHAPS, [1.5, 1.12], [0.5, 0.6], "open"),
        ("native", {}, [1.5, 1.11], [1.1, 1.5], "unclear"),  # neither is faster in both sweeps
        ("native", PERHAPS, [1.0, 1.0], [2.0, 2.0], "missed"),  # of two-shot it does not say so
        ("native", PERHAPS, [1.5, 1.11], [0.5, 0.6], "open"),
        ("one-shot", {}, [1.01, 1.0], [2.0, 2.0], "right"),
        ("one-shot", {}, [1.01, 0.99], [2.0, 2.0], "unclear"),
        ("one-shot", {}, [0.99, 0.98], [2.0, 2.0], "wrong"),
    ],
)
def test_verdicts_of_the_trial(taken, perhaps, one_shot, two_shot, word):
    sweeps = {"one-shot": one_shot, "two-shot": two_shot}
    verdict = Verdict(2, "1gbit", 4, 8192, taken, perhaps, sweeps)
    assert verdict.word == word
    said = f"{taken} (one-shot perhaps up to 1.25x)" if perhaps else taken
    assert verdict.line.startswith(f"| 1gbit, 2 ranks, 4 bits, 8 KB | {said} | ")


@pytest.mark.parametrize(
    ("environment", "argv", "message"),
    [
        ({}, [], "no ranks to examine: start it with torchrun, as in torchrun --nproc"),
        ({"WORLD_SIZE": "1", "RANK": "0"}, [], "one rank sends nothing: start 2 or more"),
        ({"WORLD_SIZE": "2"}, [], "WORLD_SIZE=2 without RANK"),
        ("two", ["--output", "t.json"], "a tuning file has the codecs of a model"),
        ("two", ["--load", "/no/ckpt", "--output", "/proc/t.json"], "/proc/t.json cannot be writ"),
        ("two", ["--load", "/no/ckpt", "--output", "/tmp"], "--output /tmp is a directory"),
        ("two", ["--load", "/no/ckpt"], "--load /no/ckpt: no such directory"),
        ("two", ["--check"], "--check starts its own ranks: leave torchrun out"),
    ],
)
def test_wrong_input_is_refused(environment, argv, message, monkeypatch, tmp_path):
    two = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name in two:
        monkeypatch.delenv(name, raising=False)
    for name, value in (two if environment == "two" else environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LowbitError, match=message):
        main(argv)


def test_unknown_arguments_need_a_model(capsys):
    with pytest.raises(SystemExit):
        main(["--second", "3"])
    assert "unrecognized arguments: --second 3 (Megatron's need --load)" in capsys.readouterr().err


class _Wrong(RotatedHybrid):
    """A kernel that is wrong on one rank; plain torch is right."""

    name = "wrong"

    def decode_sum(self, payloads, tables, *, out=None):
        total = super().decode_sum(payloads, tables, out=out)
        if dist.get_rank() == 1 and not is_disabled():
            total[0, 0] += 1
        return total


@on_each_rank(2)
def test_wrong_bits_are_found_on_every_rank(rank):
    def checked(codec) -> str:
        kind = Kind(codec, codec.tables(64), carries=codec.carries)
        ways = ("one-shot", "two-shot")
        return check_bits([kind], ways, dist.group.WORLD, torch.device("cpu"))

    carried = checked(get_codec("rotated-hybrid", bits=3))
    assert carried.endswith("one-shot and two-shot by 1 codec, carries included")
    assert checked(get_codec("int4-g32")).endswith("one-shot and two-shot by 1 codec")
    with pytest.raises(LowbitError, match="MEGATRON_LOWBIT_KERNELS=0") as error:
        checked(_Wrong())
    said = str(error.value)
    assert said.startswith("one-shot of wrong (4 bits) gives other bits than plain torch (1 of")
    assert said.endswith("(found by rank 1)")


def test_links_alone(capfd):
    with plain_ranks(2) as ranks:
        ranks.run([sys.executable, str(TOOL), "--seconds", "0.1"])
    printed = capfd.readouterr().out
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines[:5]] == "ranks links memory kernels bits".split()
    assert "2, gloo on " in lines[0] and "symmetric memory off: tensors are on cpu" in lines[2]
    for bits in (4, 2):
        head = f"rotated-hybrid in {bits} bits, errors carried:\npass "
        assert printed.count(head) == 1
    assert len(re.findall(r"decode, 1 sequence +8 KB", printed)) == 2
    assert lines[-1].endswith("ask again with --load CKPT.")
