"""Runs `triton_cases` and its neighbours where Triton can: in its interpreter, on a GPU.

In processes of their own, since whether kernels are interpreted is decided when Triton is imported.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import python
from ranks import on_each_rank

from megatron_lowbit import kernels
from megatron_lowbit.benchmark.gpu_check.work import peer_cases
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.codecs.peers.systems import PEERS
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels import select, switches

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CASES = ["triton_cases.py", "triton_carry_cases.py", "triton_rotation_cases.py"]


def _run(*command: str, **environment: str) -> str:
    """What a Python process says, once it has ended well."""
    done = python(*command, cwd=ROOT, OMP_NUM_THREADS="1", **environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def _run_cases(name: str, **environment: str) -> str:
    options = ("-c", "tests/pytest.ini", "--rootdir=.", "-q", "-p", "no:cacheprovider")
    return _run("-m", "pytest", *options, str(HERE / name), **environment)


@pytest.mark.parametrize("name", [*CASES, "symmetric_cases.py"])
def test_in_the_interpreter(name):
    assert " passed" in _run_cases(name, TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    assert " passed" in _run_cases(name, TRITON_INTERPRET="0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@on_each_rank(2, 4)
def test_symmetric_memory_of_ranks_on_one_gpu(rank):
    """As in the interpreter, over torch's own symmetric memory; then as a CUDA graph."""
    memory = peer_cases.opened(torch.device("cuda", 0))
    for number in range(len(peer_cases.CALLS)):
        peer_cases.check_call(memory, number)
    for collective in ("one-shot", "two-shot"):
        peer_cases.check_carried_call(memory, collective)
        peer_cases.check_graph_call(memory, collective)
    dist.barrier()


def test_it_compiles_for_a_gpu(tmp_path):
    """For sm_90, with or without one: nothing is fused, and no register is spilled.

    Nor are there products where none were asked for, or none where they were.
    """
    lines = _run(str(HERE / "triton_compile.py"), TRITON_CACHE_DIR=str(tmp_path))
    found = [line.split() for line in lines.splitlines()]
    # 13 kernels at two shapes, three of them on tensor cores; six over symmetric memory at the
    # long one, two of them on tensor cores; and two for bf16 and each peer's format.
    assert len(found) == 26 + 6 + 2 * (1 + len(PEERS))
    assert sum(name.endswith(".carry") for name, *_ in found) == 6
    for name, tile, registers, stack, *_ in found:
        # Those with a barrier keep a few addresses over the calls of slow square roots.
        allowed = 32 if name.startswith("symmetric") else 0
        # Encodes partials and sums, each with two rows in registers, of which 16 warps have 128.
        most = {"symmetric_kernels.two_shot": 64, "symmetric_kernels.two_shot.carry": 352}
        allowed = most.get(name, allowed)
        assert int(stack) <= allowed, f"{name} of {tile} values spills: {registers} registers"


def test_the_page_has_what_is_known_without_a_gpu(tmp_path):
    """Both tables of kernels/README.md, of one kernel: its bytes are those of its tensors."""
    only = "rotated_kernels.encode.carry"
    said = _run(str(HERE / "triton_page.py"), only, TRITON_CACHE_DIR=str(tmp_path))
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if "`" in line]
    [[name, moved, of_a_copy, instructions, share], [again, *used]] = rows
    assert name == again == "`encode` with a carry"
    row = 8192 * 4 // 8 + 2 * (8192 // 128 + 1)
    assert moved == f"{2 + 2 + row / 8192 + 2:.2f}"
    assert of_a_copy == f"{(6 + row / 8192) / 4:.2f}x"
    assert int(instructions) > 50 and 0 < int(share.rstrip("%")) < 100
    spilled = [int(cell.split(" / ")[1]) for cell in used]
    assert len(spilled) == 5 and not any(spilled)


# What a process of its own does where GPU tensors have no kernels: CPU tensors stand for them.
FALLBACK = """
import sys, warnings
if sys.argv[1] == "missing":
    sys.modules["triton"] = None
if sys.argv[1] == "old":
    import triton
    triton.__version__ = "3.2.0"
import torch

from megatron_lowbit import kernels
from megatron_lowbit.codecs import Statistics, get_codec
from megatron_lowbit.kernels import select, switches
select._kind = lambda *tensors: "cuda"
x = torch.randn(3, 64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in ("rotated-hybrid", "static-hybrid", "scaled-hybrid", "fp8-g256"):
        codec = get_codec(name)
        tables = codec.tables(64, statistics=Statistics.of(x[None]))
        for _ in range(2):
            payload = codec.encode(x, tables)
            with kernels.disabled():
                assert torch.equal(payload, codec.encode(x, tables))
            codec.decode_sum(payload[None], tables)
for warning in caught:
    print(warning.message)
"""


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("missing", "import of triton halted"),
        ("old", "Triton 3.2.0 is older than 3.5"),
        pytest.param(
            "broken",
            "not compiled with CUDA",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA"),
        ),
    ],
)
def test_without_triton_it_warns_once_and_gives_the_same(case, reason):
    [warning] = _run("-c", FALLBACK, case, TRITON_INTERPRET="0").splitlines()
    assert reason in warning
    assert "plain torch" in warning and "MEGATRON_LOWBIT_KERNELS=0" in warning


def test_kernels_that_are_off_are_not_looked_for(monkeypatch):
    monkeypatch.setattr(select, "_kind", lambda *tensors: "cuda")
    monkeypatch.setattr(select, "_try_out", lambda: pytest.fail("tried"))
    x = torch.zeros(1)
    with kernels.disabled():
        assert select.kernels_for(select.ROTATED, x) is None
        assert kernels.describe("cuda") == "none: disabled"
    monkeypatch.setenv("MEGATRON_LOWBIT_KERNELS", "0")
    assert select.kernels_for(select.STATIC, x) is None
    assert kernels.describe("cuda") == "none: switched off by MEGATRON_LOWBIT_KERNELS=0"


@pytest.fixture
def unread(monkeypatch):
    """As if the environment had not been read yet."""
    monkeypatch.setattr(switches, "_rotation", None)
    return monkeypatch


def test_the_rotation_is_chosen_by_the_environment_once(unread):
    unread.delenv(switches.ROTATION_SWITCH, raising=False)
    assert switches.rotation() == "butterflies"
    unread.setenv(switches.ROTATION_SWITCH, "tensor-cores")
    assert switches.rotation() == "butterflies"
    unread.setattr(switches, "_rotation", None)
    assert switches.rotation() == "tensor-cores"
    with switches.rotating_by("butterflies"):
        assert switches.rotation() == "butterflies"
    assert switches.rotation() == "tensor-cores"


def test_an_unknown_rotation_is_refused(unread):
    """By every call, and never as a trouble of Triton's, which would mean plain torch."""
    unread.setattr(select, "_kind", lambda *tensors: "cuda")
    unread.setattr(select, "_tried", [])
    unread.setenv(switches.ROTATION_SWITCH, "tensorcores")
    message = "MEGATRON_LOWBIT_ROTATION=tensorcores: choose butterflies or tensor-cores"
    codec, x = get_codec("rotated-hybrid"), torch.zeros(1, 64)
    for _ in range(2):
        with pytest.raises(LowbitError, match=message):
            codec.encode(x, codec.tables(64))
    with pytest.raises(LowbitError, match=message):
        select.rotation_on(torch.device("cpu"))


def test_what_ranks_must_have_in_common(monkeypatch):
    """On tensor cores the GPU and Triton's release, too; or that one rank has no Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(select, "_tried", [""])
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert select.rotation_on(gpu) == "butterflies"
    with switches.rotating_by("tensor-cores"):
        assert select.rotation_on(cpu) == "tensor-cores"
        assert kernels.describe("cuda").endswith(", rotating on tensor cores")
        assert select.rotation_on(gpu) == f"tensor-cores (a GPU, {kernels.describe('cuda')})"
        monkeypatch.setattr(select, "_tried", ["broken"])
        assert select.rotation_on(gpu) == "tensor-cores (a GPU, none: broken)"
