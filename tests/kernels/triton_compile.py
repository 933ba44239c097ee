"""Compiles the Triton kernels for GPUs that need not be there, with the launches of real calls.

    PYTHONPATH=.:tests python tests/kernels/triton_compile.py [PART OF A NAME]

prints a line for each kernel, compiled for sm_90: its name, tile, registers a thread, bytes of
stack (spilled registers) and of shared memory, and products on tensor cores.
`test_triton_kernels` runs it in a process of its own, without the interpreter; `triton_page` makes
tables of what it finds.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from cases import sample, tables_for
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_lowbit.codecs import Codec, Tables, get_codec
from megatron_lowbit.codecs.carry import NO_CARRY, Carry
from megatron_lowbit.codecs.peers.systems import PEERS
from megatron_lowbit.kernels import select, switches
from megatron_lowbit.kernels.peer_memory import PROGRAMS, PeerMemory
from megatron_lowbit.kernels.triton import (
    gathered,
    grouped,
    norm,
    rotated,
    rotated_launching,
    symmetric,
)
from megatron_lowbit.kernels.triton.launching import Tile

MODULES = (gathered, grouped, norm, rotated, rotated_launching, symmetric)
CASES = [(576, 3), (12288, 4)]  # a padded row of several blocks, the longest of the benchmark
TYPES = {
    **{torch.float32: "*fp32", torch.float16: "*fp16", torch.int16: "*i16"},
    **{torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", float: "fp32"},
}
# Of 8 ranks, which are not there as nothing is run, and of the one that is a constant in Triton.
MEMORY = PeerMemory(
    peers=torch.zeros(8, dtype=torch.int64),
    calls=torch.zeros(PROGRAMS, dtype=torch.int32),
    late=torch.zeros(1, dtype=torch.int32),
    rank=1,
    size=1 << 23,
    seconds=600,
)


@dataclass(frozen=True)
class Launch:
    """A kernel as `launching.launch` was to run it.

    Attributes:
        kernel: To compile.
        tile: Of a program.
        values: Every argument by its name.
    """

    kernel: Any
    tile: Tile
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """``module.kernel``, the format of the grouped ones, and whether it carries."""
        parts = [self.kernel.__module__.rpartition(".")[2], self.kernel.__name__]
        parts += [self.values["FORMAT"]] if "FORMAT" in self.values else []
        carries = self.values.get("given") is not None
        return ".".join([*parts, *(["carry"] if carries else [])])


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a launch.

    Attributes:
        ptx: The program.
        cubin: The same, assembled.
        registers: A thread.
        stack: Bytes of spilled registers, a thread.
        shared: Bytes of shared memory, a program.
    """

    ptx: str
    cubin: bytes
    registers: int
    stack: int
    shared: int

    def instructions(self) -> int:
        """Of the GPU, a thread: each branch and each turn of a loop counted once."""
        program = _cuobjdump(self.cubin, "-sass")
        return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)", program, re.MULTILINE))


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """CPU tensors go the way of GPU tensors inside, and launches are listed in place of run."""
    found: list[Launch] = []

    def record(kernel, programs, tile, on, *arguments, **constants) -> None:
        values = {**dict(zip(kernel.arg_names, arguments, strict=False)), **constants}
        found.append(Launch(kernel, tile, {**values, "LOG_TILE": tile.log_tile}))

    select._kind = lambda *tensors: "cuda"
    select._trouble = lambda: ""
    for module in MODULES:
        module.launch = record
    yield found


def compiled(launch: Launch, capability: int = 90) -> Compiled:
    """What Triton's launcher would have compiled, for an architecture such as 90."""
    kernel, values = launch.kernel, launch.values
    fixed = {k: v for k, v in values.items() if v is None or k.isupper() or _is_one(v)}
    signature = {k: "constexpr" if k in fixed else _type(values[k]) for k in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in fixed and _is_aligned(values[name])
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": launch.tile.warps, "enable_fp_fusion": False}
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options=options)
    cubin = made.asm["cubin"]
    found = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump(cubin, "-res-usage"))
    return Compiled(made.asm["ptx"], cubin, int(found[1]), int(found[2]), made.metadata.shared)


def _type(value) -> str:
    if isinstance(value, int):
        return "i32" if value < 2**31 else "i64"
    return TYPES[value.dtype if isinstance(value, torch.Tensor) else type(value)]


def _is_one(value) -> bool:
    return isinstance(value, int) and value == 1


def _is_aligned(value) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _cuobjdump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def checked(launch: Launch) -> str:
    """The line of a kernel for sm_90: nothing in it is fused, or is a product unasked for."""
    made, name = compiled(launch), launch.name
    assert "fma.rn.f32" not in made.ptx, f"{name} fuses: its bits are others on a GPU"
    if name.startswith("symmetric"):
        for atomic in ("atom.global.sys.release.exch.b32", "atom.global.sys.acquire.add.u32"):
            assert atomic in made.ptx, f"{name} has no {atomic}"
    products = len(re.findall(r"mma\.sync|wgmma\.mma_async", made.ptx))
    assert bool(products) == bool(launch.values.get("DOT")), f"{name}: {products} products"
    resources = f"{made.registers} {made.stack} {made.shared}"
    return f"{name} {1 << launch.tile.log_tile} {resources} {products}"


def encode_and_sum(
    name: str, hidden: int, bits: int | None, *, ranks: int = 1
) -> tuple[Codec, Tables, Tensor, Tensor]:
    """Two kernels of a codec; gives it, its tables, a partial and as many payloads as ranks."""
    codec = get_codec(name, bits=bits)
    partial = sample("normal", (2, hidden), 0).bfloat16()
    tables = tables_for(codec, [partial] * ranks, codec.default_bf16_features(hidden))
    payloads = codec.encode(partial, tables).expand(ranks, -1, -1)
    codec.decode_sum(payloads, tables, out=torch.empty_like(partial))
    return codec, tables, partial, payloads


def carry_of(partial: Tensor) -> Carry:
    """What a sync point in the middle of a chain takes and gives."""
    taken, given = torch.empty(2, *partial.shape, dtype=torch.bfloat16)
    return Carry(taken, given, torch.zeros(1, dtype=torch.int64))


def all_reduce(codec: Codec, partial: Tensor, carry: Carry) -> None:
    """Both kernels over symmetric memory."""
    tables = tables_for(codec, [partial] * 8, codec.default_bf16_features(partial.shape[1]))
    for chunk in (0, len(partial)):
        owned = carry.rows(0, 1) if chunk else NO_CARRY
        codec.all_reduce_in(
            MEMORY, partial, tables, chunk=chunk, out=partial, carry=carry, of_sum=owned
        )


def shared_kernels(hidden: int, bits: int, *, carries: bool) -> None:
    """Those of the rotated codecs over symmetric memory, without a carry, and with one."""
    codec = get_codec("shaped-hybrid", bits=bits)
    partial = sample("normal", (2, hidden), 0).bfloat16()
    for carry in (NO_CARRY, carry_of(partial)) if carries else (NO_CARRY,):
        all_reduce(codec, partial, carry)


def rotated_kernels(hidden: int, bits: int, *, butterflies: bool) -> None:
    """The others of the rotated codecs; those that carry are the same on tensor cores."""
    codec, tables, partial, payloads = encode_and_sum("shaped-hybrid", hidden, bits)
    if butterflies:
        codec.reduce_encode(payloads, tables)
        carry = carry_of(partial)
        codec.encode_with_carry(partial, tables, carry)
        codec.reduce_encode_with_carry(payloads, tables, carry)
    weight = partial[0].clone()
    norm = {"weight": weight, "epsilon": 1e-5, "residual": partial, "bias": weight}
    codec.decode_sum_norm(payloads, tables, **norm)


def every_kernel() -> None:
    """At every case; over symmetric memory, which compiles longest, at the long one."""
    for hidden, bits in CASES:
        for name in ("static-hybrid", "scaled-hybrid"):
            encode_and_sum(name, hidden, bits)
        rotated_kernels(hidden, bits, butterflies=True)
        with switches.rotating_by(switches.TENSOR_CORES):
            rotated_kernels(hidden, bits, butterflies=False)
    shared_kernels(*CASES[-1], carries=True)
    with switches.rotating_by(switches.TENSOR_CORES):
        shared_kernels(*CASES[-1], carries=False)
    for name in ("bf16", *PEERS):
        encode_and_sum(name, CASES[-1][0], None)


def listed(calls: Callable[[], None]) -> list[Launch]:
    """The launches of `calls`."""
    with launches() as found:
        calls()
    return found


def main(only: str = "") -> None:
    """Print a line for each kernel with `only` in its name."""
    for launch in listed(every_kernel):
        if only in launch.name:
            print(checked(launch), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
