"""Compiles the Triton kernels for a GPU that need not be there, with the launches of real calls.

`test_triton_kernels` runs this in a process of its own, without the interpreter. Prints a line for
each kernel: its name, tile, registers a thread, bytes of stack (spilled registers) and of shared
memory, instructions a value, and those on tensor cores.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from cases import sample, tables_for
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_lowbit.codecs import Codec, Tables, get_codec
from megatron_lowbit.codecs.peers.systems import PEERS
from megatron_lowbit.kernels import select, switches
from megatron_lowbit.kernels.peer_memory import PROGRAMS, PeerMemory
from megatron_lowbit.kernels.triton import carrying, gathered, grouped, norm, rotated, symmetric

MODULES = (carrying, gathered, grouped, norm, rotated, symmetric)
TARGET = GPUTarget("cuda", 90, 32)
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


def _compile(kernel, tokens, tile, on, *arguments, **constants) -> None:
    """What `launching.launch` would run, compiled as Triton's launcher would specialize it."""
    values = {**dict(zip(kernel.arg_names, arguments, strict=False)), **constants}
    values["LOG_TILE"] = tile.log_tile
    fixed = {k: v for k, v in values.items() if v is None or k.isupper() or _is_one(v)}
    signature = {k: "constexpr" if k in fixed else _type(values[k]) for k in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name not in fixed and _is_aligned(values[name])
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": tile.warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=TARGET, options=options)
    ptx = compiled.asm["ptx"]
    assert "fma.rn.f32" not in ptx, f"{kernel.__name__} fuses: its bits are others on a GPU"
    if "symmetric" in kernel.__module__:
        for atomic in ("atom.global.sys.release.exch.b32", "atom.global.sys.acquire.add.u32"):
            assert atomic in ptx, f"{kernel.__name__} has no {atomic}"
    products = len(re.findall(r"mma\.sync|wgmma\.mma_async", ptx))
    assert bool(products) == bool(constants.get("DOT")), f"{kernel.__name__}: {products} products"
    count = ptx.count(";") * 32 * tile.warps / (1 << tile.log_tile)
    registers, stack = _resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
    name += f".{constants['FORMAT']}" if "FORMAT" in constants else ""
    print(name, 1 << tile.log_tile, registers, stack, shared, f"{count:.0f}", products, flush=True)


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


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return int(found[1]), int(found[2])


def _all_reduce(codec: Codec, partial: Tensor) -> None:
    tables = tables_for(codec, [partial] * 8, codec.default_bf16_features(partial.shape[1]))
    for two_shot in (False, True):
        codec.all_reduce_in(MEMORY, partial, tables, chunk=2 * two_shot, out=partial)


def main() -> None:
    """Every kernel at every case."""
    select._kind = lambda *tensors: "cuda"
    select._trouble = lambda: ""
    for module in MODULES:
        module.launch = _compile
    for hidden, bits in CASES:
        for name in ("static-hybrid", "scaled-hybrid"):
            _encode_and_sum(name, hidden, bits)
        _rotated(hidden, bits, and_reduce=True)
        with switches.rotating_by(switches.TENSOR_CORES):
            _rotated(hidden, bits, and_reduce=False)  # which rotates nothing
    for name in ("bf16", *PEERS):
        _encode_and_sum(name, CASES[-1][0], None)


def _encode_and_sum(
    name: str, hidden: int, bits: int | None
) -> tuple[Codec, Tables, Tensor, Tensor]:
    """Two kernels of a codec; gives it, its tables, a partial and its payload as of one rank."""
    codec = get_codec(name, bits=bits)
    partial = sample("normal", (2, hidden), 0).bfloat16()
    tables = tables_for(codec, [partial], codec.default_bf16_features(hidden))
    payloads = codec.encode(partial, tables)[None]
    codec.decode_sum(payloads, tables, out=torch.empty_like(partial))
    return codec, tables, partial, payloads


def _rotated(hidden: int, bits: int, *, and_reduce: bool) -> None:
    codec, tables, partial, payloads = _encode_and_sum("shaped-hybrid", hidden, bits)
    if and_reduce:
        codec.reduce_encode(payloads, tables)
    _all_reduce(codec, partial)
    weight = partial[0].clone()
    norm = {"weight": weight, "epsilon": 1e-5, "residual": partial, "bias": weight}
    codec.decode_sum_norm(payloads, tables, **norm)


if __name__ == "__main__":
    sys.exit(main())
