"""Every kernel against plain torch, bit for bit, compiled in as many processes as there are cores.

First the small shapes of `kernel_cases`, the bits and types that models use most before the others;
then the kernels of the stages that measure, at their hidden size, and those of symmetric memory:
these stages find them compiled.
"""

from contextlib import nullcontext
from functools import partial

import torch

from megatron_lowbit import kernels
from megatron_lowbit.benchmark.codecs.codec_cases import (
    cases,
    check_rotated,
    make_partials,
    make_tables,
)
from megatron_lowbit.benchmark.gpu_check.stage_tasks import Rows, Task
from megatron_lowbit.benchmark.gpu_check.work import kernel_cases
from megatron_lowbit.benchmark.gpu_check.work.attempts import Case, attempts
from megatron_lowbit.benchmark.gpu_check.work.interpreted import interpret
from megatron_lowbit.benchmark.gpu_check.work.kernel_cases import with_warps
from megatron_lowbit.benchmark.gpu_check.work.peer_compile import compilations
from megatron_lowbit.codecs import parse_codec
from megatron_lowbit.kernels import switches

# What the stages measure: the default codecs at 4 bits, 8 payloads of a sum.
MEASURED, HIDDEN, RANKS = ("rotated-hybrid-4", "shaped-hybrid-4"), 8192, 8
WARPS = (4, 8, 16)  # of a program that are tried: 8 is the default at this size
_TOKENS = 16  # with which strides divide by 16 as at 4096: the compiler asks


def run(task: Task) -> Rows:
    """A row for each case of this process."""
    if task.is_rehearsal:
        interpret()
    found = few(task.device) if task.is_rehearsal else all_cases(task.device)
    yield from attempts(task.mine(found), task.device)


def few(device: str) -> list[Case]:
    """One of each kind: for a rehearsal in the interpreter."""
    return [
        *(_bits(name, 4, torch.bfloat16, device) for name in ("rotated-hybrid", "static-hybrid")),
        *(_bits(name, 4, torch.float16, device) for name in ("scaled-hybrid", "mxfp4")),
        _carried("shaped-hybrid", 4, device),
        ("rotated-hybrid folded", partial(kernel_cases.check_folded, "rotated-hybrid", device)),
        *at_shape("rotated-hybrid-4", (2, 256), 2, device),
    ]


def all_cases(device: str) -> list[Case]:
    """Every family, number of bits and type; long rows; what is measured."""
    bf16, *others = kernel_cases.DTYPES
    rotated, every, shape = kernel_cases.ROTATED, kernel_cases.ALL, (_TOKENS, HIDDEN)
    return [
        *(_bits(name, bits, bf16, device) for name, bits in kernel_cases.all_bits()),
        *(_carried(name, bits, device) for bits in kernel_cases.BITS for name in rotated),
        *((f"{n} folded", partial(kernel_cases.check_folded, n, device)) for n in rotated),
        *((f"{n} 1 x 4096", partial(kernel_cases.check_long, n, device)) for n in every),
        *(case for name in MEASURED for case in at_shape(name, shape, RANKS, device)),
        *(case for count in WARPS for case in at_shape(MEASURED[1], shape, RANKS, device, count)),
        *(_bits(name, None, dtype, device) for dtype in others for name in every),
        *compilations((2, 4), device),
    ]


def _bits(name: str, bits: int | None, dtype: torch.dtype, device: str) -> Case:
    what = f"{name} {str(dtype).removeprefix('torch.')}" + (f" {bits} bits" if bits else "")
    return what, partial(kernel_cases.check_bits, name, bits, device, dtype=dtype)


def _carried(name: str, bits: int, device: str) -> Case:
    check = partial(kernel_cases.check_carried_bits, name, bits, device)
    return f"{name} {bits} bits with a carry", check


def at_shape(
    name: str, shape: tuple[int, int], ranks: int, device: str, warps: int | None = None
) -> list[Case]:
    """A codec's operations as they are measured, by butterflies and on tensor cores."""
    ways = switches.ROTATIONS if device == "cuda" else (switches.BUTTERFLIES,)
    what = f"{name} {shape[0]} x {shape[1]}" + (f", {warps} warps" if warps else "")
    return [
        (f"{what}, {way}", partial(_check_at, name, shape, ranks, device, way, warps))
        for way in ways
    ]


def _check_at(
    name: str, shape: tuple[int, int], ranks: int, device: str, way: str, warps: int | None
) -> None:
    codec, partials = parse_codec(name), make_partials(shape, ranks, torch.device(device))
    tables = make_tables(codec, partials)
    for case in cases(codec, tables, partials):
        if way != switches.BUTTERFLIES and not case.rotates:
            continue
        with kernels.disabled():
            expected = tuple(result.clone() for result in case.call(*case.given))
        with switches.rotating_by(way), with_warps(warps) if warps else nullcontext():
            got = case.call(*case.given)
        what = f"{case.name} at {shape[0]} x {shape[1]}"
        check_rotated(way, got, expected, codec, tables, partials, what)
