"""Wrong recipes, tuning files, evaluations, saved states: a line, or read; nothing else."""

import json
import math
import random
from pathlib import Path

import pytest
from calibration.index_mutations import change_json
from evaluation import report_sample
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lowbit.calibration.recipe import Assignment, override, read_rules
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.comm.policy.timings import ByTimes, Kind
from megatron_lowbit.comm.policy.tuning import _parse
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.output import read_summary
from megatron_lowbit.evaluation.report.findings import codec_errors, compare
from megatron_lowbit.evaluation.report.results import read_results

_RULES = [
    {"match": "1.mlp.*", "bits": [3, 6]},
    {"match": "*.mlp.linear_fc2", "bf16_features": 0},
    {"match": "2.*", "codec": "rotated-hybrid", "bits": 4},
]
_POINTS = {
    (layer, f"mlp.{name}"): Assignment("shaped-hybrid", 4) for layer in (1, 2) for name in "ab"
}


def _timed(codec: str, collective: str, points: list) -> dict:
    return {"codec": codec, "carries": False, "collective": collective, "points": points}


_TUNING = {
    "format_version": 2,
    "machine": {"device": "a", "backend": "gloo"},
    "ranks": 2,
    "node_size": None,
    "link": "as it is",
    "times": [
        _timed("", "native", [[8, [1.0, 1.5]], [64, [2.0, 2.5]]]),
        _timed("bf16 (16 bits)", "one-shot", [[8, [0.5, 0.75]]]),
    ],
}


def _rules(path: Path) -> None:
    for assignment in override(_POINTS, read_rules(path), origin="it").values():
        assert assignment.is_native or assignment.make().bits <= 16
        assert assignment.bf16_features is None or assignment.bf16_features >= 0


def _tuning(path: Path) -> None:
    timings = _parse(path).timings
    kinds = [Kind(get_codec("bf16"), get_codec("bf16").tables(8))]
    times = ByTimes(timings, kinds, ["one-shot"], source="it")
    for size in (1, 8, 30, 1 << 20):
        assert times.decide("native", size).collective in ("native", "one-shot")
        for name in ("native", "one-shot"):
            ms = timings.pass_ms(kinds, name, size)
            assert math.isnan(ms) or 0 < ms < 1e20


def _evaluation(path: Path) -> None:
    json.dumps(read_summary(path), allow_nan=False)
    data = read_results([path])[0].data
    compare(data)
    if data.sync_points:
        codec_errors(data.sync_points)


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (_RULES, _rules),
        (_TUNING, _tuning),
        (report_sample.evaluation(layers=2), _evaluation),
    ],
    ids=["recipe", "tuning", "evaluation"],
)
def test_a_line_or_a_value(tmp_path_factory, content, read):
    path = tmp_path_factory.mktemp("json") / "a.json"

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**32))
    def check(seed):
        change_json(json.loads(json.dumps(content)), path, random.Random(seed))
        try:
            read(path)
        except LowbitError as error:
            assert str(error).isprintable() and len(str(error)) < 2000

    check()
