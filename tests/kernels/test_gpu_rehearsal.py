"""The stages of tools/gpu_check.sh on a CPU, in Triton's interpreter: they find what is wrong."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cases import sample
from processes import printed

from megatron_lowbit.benchmark.gpu_check import gpu_results, record_partials, saved_partials
from megatron_lowbit.benchmark.gpu_check.gpu_results import FAILED, PASSED, SKIPPED
from megatron_lowbit.benchmark.gpu_check.gpu_stages import STAGES, Stage
from megatron_lowbit.benchmark.gpu_check.stage_runner import Setting, run
from megatron_lowbit.benchmark.gpu_check.work import chain_stage, peer_cases
from megatron_lowbit.errors import LowbitError

pytest.importorskip("triton")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOOL = ROOT / "tools" / "gpu_check.sh"
BITS, PARTIALS = STAGES[0], STAGES[-1]


def test_every_stage_is_rehearsed(tmp_path):
    """By the tool: all pass, but that no graph is captured, and that partials may be missing."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(TOOL), str(tmp_path / "out"), "--rehearse", "--minutes", "20"]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "out" / "gpu_check.json").read_bytes())
    assert content["rehearsal"] and content["machine"]["device"].startswith("a CPU")
    assert content["machine"]["torch"] and content["machine"]["triton"]
    stages = content["stages"]
    assert stages.pop("partials")["status"] in (PASSED, SKIPPED)
    assert {name for name, one in stages.items() if one["status"] != PASSED} == {"capture"}
    assert stages["capture"]["reason"].startswith("a rehearsal captures no CUDA graph")
    assert all(one["results"] for one in stages.values())
    operations = {
        row["best"]["operation"] for row in stages["settings"]["results"] if "best" in row
    }
    assert {"encode", "encode with a carry", "two-shot"} < operations
    [measured] = stages["speed"]["results"]
    assert {"torch", "kernel"} <= {row["path"] for row in measured["rows"]}


def rehearsed(tmp_path, stage: Stage, partials: Path) -> dict:
    """The results of one stage."""
    content = gpu_results.new([stage], minutes=5, is_rehearsal=True)
    setting = Setting(tmp_path, "cpu", partials)
    run(content, [stage], setting, seconds=300, say=lambda text: None)
    return content["stages"][stage.name]


def test_a_kernel_with_other_bits_is_found(tmp_path, monkeypatch):
    """By its case, and the kernels of other codecs stay right."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    wrong = replace(BITS, module="wrong_kernels", function="encode", processes=1)
    found = rehearsed(tmp_path, wrong, tmp_path / "none")
    bad = {row["case"]: row["error"] for row in found["results"] if "error" in row}
    assert found["status"] == FAILED
    assert any(name.startswith("rotated-hybrid bfloat16") for name in bad)
    assert all("other bits" in text or "wrong result" in text for text in bad.values()), bad
    assert any(row["case"].startswith("static-hybrid") for row in found["results"])
    assert not any(name.startswith(("static", "scaled", "mxfp4")) for name in bad)


@pytest.fixture
def saved(tmp_path):
    """Three sync points of two ranks, with statistics of other tokens."""
    partials = [sample("heavy-tailed", (2, 4, 192), seed).bfloat16() for seed in range(6)]
    made = record_partials.make(["a", "b", "c"], partials[:3], partials[3:])
    record_partials.write(made, tmp_path / "partials.safetensors")
    return tmp_path / "partials.safetensors"


def test_saved_partials_have_the_bits_of_plain_torch(saved, tmp_path):
    loaded = saved_partials.load(saved)
    assert loaded.names == ["a", "b", "c"] and loaded.partials[0].shape == (2, 4, 192)
    assert loaded.tables[1].bf16_index.numel() == 1 and len(set(loaded.digests)) == 3
    (tmp_path / "out").mkdir()
    found = rehearsed(tmp_path / "out", PARTIALS, saved)
    assert (found["status"], found["reason"]) == (PASSED, "")
    assert [row["case"] for row in found["results"]] == ["point a", "point b"]


def test_partials_that_gave_other_bits_where_they_were_saved(saved):
    """Of another machine's plain torch: told by its digests."""
    loaded = saved_partials.load(saved)
    other = replace(loaded, digests=[loaded.digests[0], "0" * 64, loaded.digests[2]])
    chains = [list(saved_partials.chain(other, "cpu")) for _ in range(2)]
    checks = [chain_stage.check(other, n, iter(chains[0][n:]), chains[1]) for n in range(3)]
    assert checks[0]()["tokens"] == checks[2]()["tokens"] == 4
    with pytest.raises(LowbitError, match="plain torch gives other bits on this CPU"):
        checks[1]()
    chains[0][2]["carries"][1, 3, 7] += 1
    with pytest.raises(LowbitError, match=r"carries: other bits, first at \[1, 3, 7\]"):
        chain_stage.check(other, 2, iter(chains[0][2:]), chains[1])()


def test_no_partials_and_damaged_ones(saved, tmp_path):
    (tmp_path / "out").mkdir()
    found = rehearsed(tmp_path / "out", PARTIALS, tmp_path / "none.safetensors")
    assert found["status"] == SKIPPED
    assert found["reason"].startswith("no none.safetensors: make it by tools/gpu_check.sh")
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(LowbitError, match="has no saved partials .*: save it again by"):
        saved_partials.load(saved)


def test_too_many_partials_are_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(record_partials, "MOST_BYTES", 1000)
    with pytest.raises(LowbitError, match="the partials have .* bytes, 1,000 are allowed"):
        record_partials.write(saved_partials.load(saved), tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_kernels_for_a_gpu_need_no_numpy():
    """Triton's interpreter does, and a rented machine interprets nothing."""
    code = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
sys.modules["numpy"] = None
from megatron_lowbit.kernels import select
for family in (select.ROTATED, select.STATIC, select.SCALED, select.GROUPED, select.NORM):
    select._module(family)
select.symmetric()
"""
    printed(code)


def test_every_kernel_of_symmetric_memory_is_compiled_before_it_runs():
    """For each rank the calls of `peer_cases`, but the empty one and one that stays away."""
    code = """
import os
os.environ.pop("TRITON_INTERPRET", None)
from triton.runtime.jit import JITFunction
from megatron_lowbit.benchmark.gpu_check.work import interpreted, peer_compile
seen = []
JITFunction.warmup = lambda self, *_, grid, **more: seen.append((self.__name__, grid, more["TRAP"]))
interpreted.interpret()
cases = peer_compile.compilations((2, 4), "cpu")
for _, case in cases:
    case()
print(len(cases), len(seen), *sorted({(name, *grid, trap) for name, grid, trap in seen}))
"""
    cases, seen = 6 * (len(peer_cases.CALLS) + 5), 6 * (len(peer_cases.CALLS) - 1 + 4) + 1 + 3
    kernels = "('one_shot', 32, True) ('two_shot', 32, False) ('two_shot', 32, True)"
    assert printed(code) == f"{cases} {seen} {kernels}\n"
