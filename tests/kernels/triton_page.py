"""What can be known of the Triton kernels without a GPU: the tables of kernels/README.md.

    PYTHONPATH=.:tests python tests/kernels/triton_page.py [PART OF A NAME]

Bytes a value are those of the tensors that a launch reads and writes, each once; tables, which stay
in the caches, are left out. Instructions a value are those of the compiled program, of which a
kernel that sums has as many more for each rank as it has without the specialization for one.

The prediction is the longer of two times: the bytes at the bandwidth of a copy, and the
instructions at one a clock in each of the GPU's schedulers. It knows neither latency, barriers,
banks of shared memory nor what does not overlap, so a measured share will be lower.
"""

import sys
from functools import partial as bound

import triton_compile
from torch import Tensor

CAPABILITIES = (80, 89, 90, 100, 120)
HIDDEN, BITS, RANKS = 8192, 4, 8
# An H200: its copy, read and written, was measured at 4.3e12 bytes a second; its data sheet has 132
# multiprocessors of 4 schedulers, each for 32 lanes, at most 1.98 GHz.
COPY, LANES = 4.3e12, 132 * 4 * 32 * 1.98e9
READ = ("partial", "taken", "payloads", "residual")
WRITTEN = ("payload", "given", "out", "normed", "total")


def calls(ranks: int) -> None:
    """What the tables have: each kernel of the default codec that a model runs."""
    codec, tables, partial, payloads = triton_compile.encode_and_sum(
        "shaped-hybrid", HIDDEN, BITS, ranks=ranks
    )
    carry = triton_compile.carry_of(partial)
    codec.encode_with_carry(partial, tables, carry)
    codec.reduce_encode(payloads, tables)
    codec.reduce_encode_with_carry(payloads, tables, carry)
    weight = partial[0].clone()
    codec.decode_sum_norm(payloads, tables, weight=weight, epsilon=1e-5, residual=partial)


def bytes_a_value(launch: triton_compile.Launch) -> float:
    """Read and written, of what is not a table."""
    values = launch.values
    moved = [values[name] for name in (*READ, *WRITTEN) if isinstance(values.get(name), Tensor)]
    tokens = next(len(x) for x in moved if x.ndim == 2)
    return sum(x.numel() * x.element_size() for x in moved) / (tokens * values["HIDDEN"])


def instructions_a_value(launch: triton_compile.Launch) -> float:
    """Of the program for sm_90."""
    threads = 32 * launch.tile.warps / (1 << launch.tile.log_tile)
    return triton_compile.compiled(launch).instructions() * threads


def predicted(bytes_: float, instructions: float) -> float:
    """The share of the copy's bandwidth."""
    return min(1.0, (bytes_ / COPY) / (instructions / LANES))


def costs(only: str) -> list[list[str]]:
    """Rows of the first table."""
    one, several = (triton_compile.listed(bound(calls, ranks)) for ranks in (1, RANKS))
    rows = []
    for alone, launch in zip(one, several, strict=True):
        if only not in launch.name:
            continue
        moved, count = bytes_a_value(launch), instructions_a_value(launch)
        if "ranks" in launch.values:  # a turn of the loop is the difference to one rank
            first = instructions_a_value(alone)
            count = first + (RANKS - 1) * (count - first)
        share = f"{predicted(moved, count):.0%}"
        rows.append([_title(launch), f"{moved:.2f}", f"{moved / 4:.2f}x", f"{count:.0f}", share])
    return rows


def resources(only: str) -> list[list[str]]:
    """Rows of the second table: registers, bytes spilled and KiB of shared memory of each GPU."""
    shared = bound(triton_compile.shared_kernels, HIDDEN, BITS, carries=True)
    found = triton_compile.listed(bound(calls, 1)) + triton_compile.listed(shared)
    return [
        [_title(launch), *(_used(triton_compile.compiled(launch, sm)) for sm in CAPABILITIES)]
        for launch in found
        if only in launch.name
    ]


def text(only: str = "") -> str:
    """Both tables in Markdown, of the kernels with `only` in their names."""
    head = ["kernel", "bytes a value", "of a copy", "instructions a value", "predicted share"]
    first = _table(head, costs(only))
    second = _table(["kernel", *(f"sm_{sm}" for sm in CAPABILITIES)], resources(only))
    return f"{first}\n\n{second}"


def _title(launch: triton_compile.Launch) -> str:
    module, kernel, *more = launch.name.split(".")
    name = kernel.lstrip("_") if module != "symmetric_kernels" else f"symmetric {kernel}"
    return f"`{name}`" + (" with a carry" if more else "")


def _used(made: triton_compile.Compiled) -> str:
    return f"{made.registers} / {made.stack} / {made.shared / 1024:.0f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(text(*sys.argv[1:]))
