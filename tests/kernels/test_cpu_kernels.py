"""The C kernels against the plain torch that specifies them, bit for bit.

Where a value is NaN only that it is NaN is compared: its bits differ between CPUs, in torch too.
"""

import multiprocessing
import os
import platform
import subprocess
import sys

import pytest
import torch
from cases import DTYPES, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lowbit import kernels
from megatron_lowbit.benchmark.gpu_check.work import hard_cases, kernel_cases
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import tables_of
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.codecs.codebook import thresholds
from megatron_lowbit.codecs.rotated_hybrid import RotatedHybrid
from megatron_lowbit.codecs.rotation import signs
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels import switches
from megatron_lowbit.kernels.cpu import build

NONE = kernels.describe() if kernels.describe().startswith("none") else None
needs_kernel = pytest.mark.skipif(NONE is not None, reason=str(NONE))

HIDDEN = [1, 33, 48, 64, 96, 576, 1000, 4096, 5120]
KINDS = ["normal", "heavy-tailed", "one-outlier", "constant", "zero"]
BITS = sorted(RotatedHybrid.supported_bits)
OUT_DTYPES = [None, *DTYPES]


def _check(codec, partials: list[Tensor], tables) -> None:
    """All that is made of `partials`, of the last with a carry, each against plain torch."""
    _check_sums(codec, kernel_cases.check(codec, partials, tables), tables)
    taken = partials[-1].flip(0)
    kernel_cases.check_carry(codec, partials[-1], taken, tables, rank=len(partials) - 1)


def _check_sums(codec, payloads: Tensor, tables) -> None:
    """All that is made of `payloads`, likewise."""
    kernel_cases.check_sums(codec, payloads, tables, dtypes=OUT_DTYPES)
    taken = codec.decode_sum(payloads, tables).flip(0)
    got, right = (kernel_cases.new_carry(taken, *taken.shape, "cpu") for _ in range(2))
    with kernels.disabled():
        expected = codec.reduce_encode_with_carry(payloads, tables, right)
    payload = codec.reduce_encode_with_carry(payloads, tables, got)
    kernel_cases.same_payload(payload, expected, codec.for_sum(), tables)
    kernel_cases.same(got.given, right.given, f"{codec}: what a sum gives")
    assert got.bounded == right.bounded


@needs_kernel
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["rotated-hybrid", "shaped-hybrid"])
def test_every_input(name, bits, hidden):
    codec = get_codec(name, bits=(bits, BITS[-1] - bits + BITS[0]))
    kinds = [kind for kind in KINDS if kind != "one-outlier" or hidden > 5]
    for dtype in DTYPES:
        for kept in {0, 1, min(5, hidden), hidden} if hidden < 4096 else {0, 5}:
            tables = tables_of(codec, hidden, kept, ranks=len(kinds))
            _check(codec, [sample(kind, (3, hidden), 1).to(dtype) for kind in kinds], tables)
            _check(codec, [sample("zero", (2, hidden), 1).to(dtype)], tables)  # zeros have signs


@needs_kernel
@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_number_of_ranks(ranks):
    codec = get_codec("rotated-hybrid", bits=(4, 6))
    partials = [sample("heavy-tailed", (5, 576), seed) for seed in range(ranks)]
    _check(codec, partials, tables_of(codec, 576, 4))


@needs_kernel
def test_the_tree_of_squares():
    """Another order of its additions changes the BF16 scale of one row in ten thousand or so."""
    codec = get_codec("rotated-hybrid")
    partial = sample("heavy-tailed", (200_000, 33), 0)
    kernel_cases.check(codec, [partial], tables_of(codec, 33, 0))


@needs_kernel
def test_errors_next_to_their_bound():
    """C looks at the exact sums of squares only where a quick one is too near to the bound."""
    partial = sample("normal", (20_000, 33), 0)
    partial[:, 7] = torch.linspace(0, 40, len(partial))  # the larger, the more of it is missed
    codec = get_codec("rotated-hybrid", bits=1)
    tables, taken = tables_of(codec, 33, 0), torch.zeros(20_000, 33)
    assert 1000 < kernel_cases.check_carry(codec, partial, taken, tables) < 19_000


@needs_kernel
@pytest.mark.parametrize("bits", BITS)
def test_values_next_to_a_threshold(bits):
    """And next to where the cells of kernels/cpu/search.h meet, which have to decide nothing."""
    edges = torch.cat([thresholds(bits, torch.device("cpu")), torch.arange(-320.0, 321) / 32])
    up, down = (edges.nextafter(torch.tensor(way)) for way in (torch.inf, -torch.inf))
    values = torch.cat([edges, up, down])
    # An odd hidden size rotates nothing, and a root mean square of 1 divides by nothing.
    row = torch.nn.functional.pad(values, (1, 2**16 - len(values)))
    row[0] = (row.numel() - values.double().square().sum()).sqrt()
    row *= signs(row.numel())
    codec = get_codec("rotated-hybrid", bits=bits)
    tables = tables_of(codec, row.numel(), 0)
    _check(codec, [row.view(1, -1)], tables)
    scale = codec.encode(row.view(1, -1), tables)[:, -2:].contiguous().view(torch.bfloat16)
    assert scale.item() == 1


@needs_kernel
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_any_bits_in_any_shape(data):
    """Inputs, then payloads, of random bytes: NaN, infinities, subnormals, every magnitude."""
    bits = (data.draw(st.sampled_from(BITS)), data.draw(st.sampled_from(BITS)))
    codec = get_codec("rotated-hybrid", bits=bits)
    tokens, hidden = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 300))
    tables = tables_of(codec, hidden, data.draw(st.integers(0, 9)))
    dtype, seed = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)

    def random_bytes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    raw = random_bytes(tokens * hidden * dtype.itemsize).view(dtype).view(tokens, hidden)
    magnitude = 2.0 ** data.draw(st.integers(-100, 60))
    scaled = torch.randn(tokens, hidden, generator=generator) * magnitude
    _check(codec, [raw, scaled.to(dtype)], tables)
    ranks = data.draw(st.integers(1, 5))
    _check_sums(codec, random_bytes(ranks, tokens, codec.row_bytes(tables)), tables)


@needs_kernel
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kept", [0, 3, 96])
def test_rows_that_are_not_finite(bad, kept):
    codec = get_codec("rotated-hybrid")
    partials = [sample("normal", (96, 96), seed) for seed in range(2)]
    partials[1].fill_diagonal_(bad)  # every feature in some token
    _check(codec, partials, tables_of(codec, 96, kept))
    _check(
        codec, [torch.full((2, 96), 3.4e38), torch.full((2, 96), 1e-45)], tables_of(codec, 96, 2)
    )


@needs_kernel
def test_every_fp16_and_every_bf16():
    codec = get_codec("rotated-hybrid")
    tables = tables_of(codec, 256, 256)
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)
        _check(codec, [every, every.flip(0)], tables)


@needs_kernel
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_any_strides(dtype):
    codec = get_codec("rotated-hybrid", bits=3)
    tables, wide = tables_of(codec, 48, 2), sample("normal", (96, 100), 0).to(dtype)
    for view in (wide[:20, 3:51], wide[::5, 1:49], wide[:48].T, wide[:1, 4:52].expand(7, 48)):
        _check(codec, [view], tables)
    if dtype in DTYPES:  # of payloads and sums, too
        hard_cases.check_strides(codec.name, dtype, "cpu")
        hard_cases.check_carry_strides(dtype, "cpu")


@needs_kernel
def test_offsets_above_two_to_the_31():
    far = hard_cases.far_memory("cpu")
    if far is None:
        pytest.skip("this machine does not reserve 4 GiB")
    hard_cases.check_far("rotated-hybrid", far)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@needs_kernel
def test_threads_change_nothing(three_threads):
    codec = get_codec("rotated-hybrid")
    partials = [sample("normal", (1000, 576), seed) for seed in range(2)]
    _check(codec, partials, tables_of(codec, 576, 4))


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(three_threads):
    codec = get_codec("rotated-hybrid")
    partial = sample("normal", (1000, 576), 0)
    tables = tables_of(codec, 576, 4)
    expected = bytes(codec.encode(partial, tables).numpy())

    def child() -> None:
        os._exit(0 if bytes(codec.encode(partial, tables).numpy()) == expected else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0


@needs_kernel
def test_wrong_shapes_are_named():
    codec = get_codec("rotated-hybrid")
    tables = tables_of(codec, 64, 1)
    with pytest.raises(LowbitError, match=r"\[tokens, 64\], got \[2, 65\]"):
        codec.encode(torch.zeros(2, 65), tables)
    for payloads in (torch.zeros(1, 2, 35), torch.zeros(1, 2, 36), torch.zeros(0, 2, 36)):
        with pytest.raises(LowbitError, match=r"uint8 \[ranks, tokens, 36\], got torch.float32"):
            codec.decode_sum(payloads, tables)
        with pytest.raises(LowbitError, match=r"uint8 \[ranks, tokens, 36\]"):
            codec.reduce_encode(payloads[:, :, :-1].byte(), tables)


# What a process of its own finds: the kernels, the warnings, and a digest of what it computed.
PROBE = """
import hashlib, warnings, torch
from megatron_lowbit import kernels
from megatron_lowbit.codecs import get_codec
from megatron_lowbit.codecs.carry import Carry
digest = hashlib.sha256()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for bits in (1, 2, 3, 4, 5, 6):
        for hidden in (1, 33, 48, 576):
            codec = get_codec("rotated-hybrid", bits=(bits, 7 - bits))
            tables = codec.tables(hidden, bf16_index=torch.tensor([hidden // 2]))
            x = torch.arange(7.0 * hidden).view(7, hidden).sin().bfloat16()
            carry = torch.empty_like(x)
            payloads = codec.encode(x, tables).expand(3, -1, -1)
            for result in (codec.decode_sum(payloads, tables).view(torch.uint8),
                           payloads, codec.reduce_encode(payloads, tables),
                           codec.encode_with_carry(x, tables, Carry(x, carry)),
                           carry.view(torch.uint8),
                           codec.reduce_encode_with_carry(payloads, tables, Carry(carry, carry)),
                           carry.view(torch.uint8)):
                digest.update(result.contiguous().numpy().tobytes())
print(digest.hexdigest())
print(kernels.describe())
for warning in caught:
    print(warning.message)
"""


def _start(**environment: str) -> subprocess.Popen:
    search = os.pathsep.join(sys.path)
    env = {**os.environ, "PYTHONPATH": search, switches.SWITCH: "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", PROBE], stdout=subprocess.PIPE, text=True, env=env
    )


def _finish(process: subprocess.Popen) -> list[str]:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return output.splitlines()


@pytest.fixture(scope="module")
def plain_digest():
    digest, kernel, *warned = _finish(_start(**{switches.SWITCH: "0"}))
    assert kernel == f"none: switched off by {switches.SWITCH}=0"
    assert not warned
    return digest


def test_without_a_compiler_it_warns_once_and_gives_the_same(tmp_path, plain_digest):
    environment = {"CC": "/nonexistent/cc", "XDG_CACHE_HOME": str(tmp_path)}
    digest, kernel, *warned = _finish(_start(**environment))
    assert digest == plain_digest
    assert kernel == "none: no C compiler: CC names /nonexistent/cc, which cannot be run"
    assert len(warned) == 1
    assert "/nonexistent/cc" in warned[0] and "times slower" in warned[0]


def test_a_compiler_that_fails_is_quoted(tmp_path, plain_digest):
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\necho 'error: out of order' >&2\nexit 1\n")
    compiler.chmod(0o755)
    environment = {"CC": str(compiler), "XDG_CACHE_HOME": str(tmp_path)}
    digest, kernel, *warned = _finish(_start(**environment))
    assert digest == plain_digest
    assert kernel.endswith("broken-cc failed: error: out of order")
    assert len(warned) == 1


@needs_kernel
def test_two_processes_build_at_once(tmp_path, plain_digest):
    both = [_start(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    for process in both:
        digest, kernel, *warned = _finish(process)
        assert digest == plain_digest
        assert kernel.startswith("C (")
        assert not warned
    [built] = (tmp_path / "megatron_lowbit").iterdir()
    built.write_bytes(b"damaged")
    assert _finish(_start(XDG_CACHE_HOME=str(tmp_path)))[1].startswith("C (")
    assert built.stat().st_size > 1000


@needs_kernel
def test_a_cache_that_cannot_be_written(tmp_path, plain_digest):
    (tmp_path / "file").touch()
    digest, kernel, *warned = _finish(_start(XDG_CACHE_HOME=str(tmp_path / "file")))
    assert digest == plain_digest
    assert kernel.startswith("C (")
    assert not warned


@needs_kernel
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx2"])
def test_older_instruction_sets(flag, tmp_path, plain_digest):
    """What AVX2 and what any other CPU runs."""
    compiler = " ".join([*build._compiler(), flag])
    digest, kernel, *_ = _finish(_start(CC=compiler, XDG_CACHE_HOME=str(tmp_path)))
    assert kernel.startswith("C (")
    assert digest == plain_digest


def test_disabled_ends_with_its_block():
    before = kernels.describe()
    with kernels.disabled():
        with kernels.disabled():
            pass
        assert kernels.describe() == "none: disabled"
    assert kernels.describe() == before
