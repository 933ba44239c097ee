"""tools/bench_codecs.py: rows that add up, a check before every figure, refused options."""

import json
from pathlib import Path

import pytest
import torch
from processes import python

from megatron_lowbit import kernels
from megatron_lowbit.benchmark.codecs import codec_bench
from megatron_lowbit.benchmark.codecs.codec_bench import Plan, parse_shapes
from megatron_lowbit.benchmark.codecs.codec_cases import check_close
from megatron_lowbit.codecs import get_codec, wire
from megatron_lowbit.codecs.rotated_hybrid import RotatedHybrid
from megatron_lowbit.errors import LowbitError

TOOL = Path(__file__).resolve().parents[2] / "tools/bench_codecs.py"
PLAN = Plan(
    codecs=("rotated-hybrid-4", "fp8-g256"),
    shapes=[(3, 256)],  # with two BF16 features
    ranks=2,
    seconds=0.001,
    device=torch.device("cpu"),
)
NONE = kernels.describe() if kernels.describe().startswith("none") else None
needs_kernel = pytest.mark.skipif(NONE is not None, reason=str(NONE))


@pytest.fixture(autouse=True)
def a_small_copy(monkeypatch):
    monkeypatch.setitem(codec_bench._COPY_BYTES, "cpu", 1 << 20)


@needs_kernel
def test_rows():
    said = []
    rows = codec_bench.run(PLAN, said.append)
    assert len(said) == 2  # the copy's bandwidth, and a line for the shape
    operations = (
        *("encode", "encode with a carry", "decode_sum of 2"),
        *("encode + decode_sum of 2", "reduce_encode of 2"),
    )
    of_rotated = ("encode, folded", "reduce_encode of 2 with a carry")
    own = {
        ("rotated-hybrid-4", operation, path)
        for operation in (*operations, *of_rotated)
        for path in ("torch", "kernel")
    }
    peer = {
        ("fp8-g256", operation, "torch") for operation in operations if "carry" not in operation
    }
    found = [(row["codec"], row["operation"], row["path"]) for row in rows]
    assert set(found) == own | peer | {("bf16", "copy", "torch")}
    assert len(found) == len(set(found))
    for row in rows:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["calls"] >= 7
        assert row["gb_s"] == pytest.approx(
            row["bytes"] / row["median_ms"] / 1e6, rel=0.1, abs=1e-3
        )
        assert ("speedup" in row) == (row["path"] == "kernel")
    codec = get_codec("rotated-hybrid")
    sent = 3 * codec.row_bytes(codec.tables(256, bf16_index=torch.arange(2)))
    moved = {row["operation"]: row["bytes"] for row in rows if row["codec"] == "rotated-hybrid-4"}
    assert moved == {
        "encode": 1536 + sent,
        "encode with a carry": 3 * 1536 + sent,
        "encode, folded": 1536 + 12 + sent,
        "decode_sum of 2": 2 * sent + 1536,
        "encode + decode_sum of 2": 1536 + sent + 2 * sent + 1536,
        "reduce_encode of 2": 2 * sent + sent,
        "reduce_encode of 2 with a carry": 2 * sent + 2 * 1536 + sent,
    }
    lines = codec_bench.table(rows).splitlines()
    assert len(lines) == len(rows) + 1
    assert len({len(line) for line in lines}) == 1


@needs_kernel
def test_a_wrong_kernel_gets_no_figure(monkeypatch):
    class Wrong:
        def __init__(self, module):
            self._module = module

        def __getattr__(self, name):
            return lambda *a, **k: getattr(self._module, name)(*a, **k).add_(1)

    right = RotatedHybrid.kernels

    def kernels_of(self, *arguments, **others):
        module = right(self, *arguments, **others)
        return module and Wrong(module)

    monkeypatch.setattr(RotatedHybrid, "kernels", kernels_of)
    message = r"wrong result of rotated-hybrid-4 encode at 3 x 256: .* differ first at \[0, 0\]"
    with pytest.raises(LowbitError, match=message):
        codec_bench.run(PLAN, lambda text: None)


def test_what_is_not_close_gets_no_figure():
    """Of 40,960 values: four codes may be one step off, and a sum 0.01 dB."""
    codec = get_codec("rotated-hybrid")
    tables = codec.tables(1024)
    exact = torch.randn(40, 1024, generator=torch.Generator().manual_seed(0))
    right = codec.encode(exact, tables)
    codes = wire.unpack(right[:, :512], 4, 1024)
    step = torch.where(codes > 7, -1, 1)

    def check(steps: torch.Tensor, noise: float) -> None:
        packed = wire.pack(codes + steps, 4)
        payload = torch.cat([packed, right[:, 512:]], dim=1)
        total = codec.decode_sum(right[None], tables)
        got = (payload, exact + (total - exact) * noise)
        check_close(got, (right, total), codec, tables, exact, "it")

    few = step * (torch.arange(1024) == 3) * (torch.arange(40) < 4)[:, None]
    check(few, 1.001)
    with pytest.raises(LowbitError, match="wrong result of it .* a code differs by 2 steps"):
        check(2 * few, 1)
    with pytest.raises(LowbitError, match="5 codes of 40960 differ"):
        check(step * (torch.arange(1024) == 3) * (torch.arange(40) < 5)[:, None], 1)
    with pytest.raises(LowbitError, match=r"a signal to noise ratio of 2\S+ dB, not 2\S+ dB"):
        check(few, 1.002)
    with pytest.raises(LowbitError, match="a signal to noise ratio of nan dB"):
        check(few, torch.nan)


def test_shapes():
    assert parse_shapes("512x4096,1x8192") == [(512, 4096), (1, 8192)]
    for bad in ("512", "0x64", "4096*512", "1x2x3", ""):
        with pytest.raises(LowbitError, match="is no list of shapes: write it like 512x4096"):
            parse_shapes(bad)


@pytest.mark.slow
def test_the_command(tmp_path):
    output = tmp_path / "codecs.json"
    small = ["--shapes", "2x64", "--codecs", "rotated-hybrid-3", "--seconds", "0.001"]
    command = [TOOL, *small, "--device", "cpu", "--output", output]
    done = python(*command)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_bytes())
    assert {row["codec"] for row in rows} == {"bf16", "rotated-hybrid-3"}
    assert "2 x 64: checked and timed" in done.stdout
    meta = json.loads(output.with_suffix(".meta.json").read_bytes())
    assert meta["machine"]["kernels"] == kernels.describe()
    assert meta["command"][2:4] == small[:2] and meta["commit"] and meta["versions"]["torch"]
    command[command.index("rotated-hybrid-3")] = "rotated-hybrid-7"
    done = python(*command)
    assert done.returncode == 1
    assert done.stderr.startswith("bench_codecs.py: error: codec rotated-hybrid has no 7-bit")
    assert len(done.stderr.splitlines()) == 1
