"""Times of the codecs alone, in plain torch and by kernels: what `codec_cases` lists.

A case is checked before it is timed: the kernels' bytes and sums must be those of plain torch, or
there is no figure; where they rotate on tensor cores, within the bounds of `closeness`. What counts
is the bytes that must move, each input and output once, as a share of the bandwidth of a plain copy
in the same run. On a GPU every call takes other inputs, so many that they do not fit its L2 cache,
and short messages are timed under a CUDA graph, too, which replays on the same.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from megatron_lowbit import kernels
from megatron_lowbit.benchmark.codecs.codec_cases import (
    Case,
    cases,
    check_rotated,
    make_partials,
    make_tables,
)
from megatron_lowbit.benchmark.timing import Call, Times, time_alone
from megatron_lowbit.codecs import Codec, parse_codec
from megatron_lowbit.comm.policy.tuning import cpu_name
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.kernels import select, switches
from megatron_lowbit.text_table import aligned

CODECS = (
    "rotated-hybrid-4",
    "rotated-hybrid-3",
    "rotated-hybrid-6",
    "static-hybrid",
    "scaled-hybrid",
    "fp8-g256",
)
SHAPES = {
    "cpu": [(1, 4096), (64, 4096), (512, 4096)],
    "cuda": list(itertools.product((1, 16, 64, 512, 4096, 16384), (576, 2048, 4096, 5120, 8192))),
}
SHAPES["cuda"] += [(tokens, 12288) for tokens in (1, 16, 64, 512, 4096)]
_GRAPH_TOKENS = 64  # up to so many a launch costs more than the work
_COPY_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}  # beyond the caches
_MOST_COPIES = 4096

Row = dict


@dataclass(frozen=True)
class Plan:
    """What is measured: messages (tokens, hidden), and sums of as many payloads as ranks.

    Codecs are named as in results, ``rotated-hybrid-4``; each case gets `seconds`.
    """

    codecs: tuple[str, ...]
    shapes: list[tuple[int, int]]
    ranks: int
    seconds: float
    device: torch.device


def run(plan: Plan, say: Callable[[str], None]) -> list[Row]:
    """Measure `plan`; a dict a case: shape, codec, operation, path, times, GB/s and shares.

    Raises:
        LowbitError: An unknown codec, or a result of the kernels that is not plain torch's.
    """
    codecs = {name: parse_codec(name) for name in plan.codecs}
    with torch.inference_mode():
        bandwidth = _copy_bandwidth(plan)
        say(f"copy: {bandwidth / 1e9:.1f} GB/s, read and written")
        rows = []
        for shape in plan.shapes:
            partials = make_partials(shape, plan.ranks, plan.device)
            rows.append(_row(shape, "bf16", "copy", "torch", *_copy(plan, partials[0]), bandwidth))
            for name, codec in codecs.items():
                rows += _measure(plan, shape, name, codec, partials, bandwidth)
            say(f"{shape[0]} x {shape[1]}: checked and timed")
    return rows


def table(rows: list[Row]) -> str:
    """The rows as lines of text, a head first."""
    head = ["tokens x hidden", "codec", "operation", "path", "median ms", "p10", "p90", "GB/s"]
    lines = [[*head, "of copy", "of torch"]]
    for row in rows:
        times = (f"{row[key]:.4g}" for key in ("median_ms", "p10_ms", "p90_ms"))
        speedup = f"{row['speedup']:.2f}x" if "speedup" in row else ""
        lines.append(
            [
                f"{row['tokens']} x {row['hidden']}",
                *(row["codec"], row["operation"], row["path"]),
                *times,
                f"{row['gb_s']:.3g}",
                f"{row['copy_share']:.1%}",
                speedup,
            ]
        )
    return "\n".join(aligned(lines, left=4))


def _measure(plan, shape, name: str, codec: Codec, partials: list[Tensor], bandwidth) -> list[Row]:
    """Every operation of one codec at one shape: in plain torch, and by kernels in every way."""
    tables = make_tables(codec, partials)
    module = codec.kernels(partials[0], tables)
    rows = []
    for case in cases(codec, tables, partials):
        plain = kernels.disabled()(case.call)
        expected = tuple(result.clone() for result in plain(*case.given))
        calls = {"torch": _rotating(plain, case.given)}
        what = f"{name} {case.name} at {shape[0]} x {shape[1]}"
        for path, way in _ways(module, case).items():
            call = switches.rotating_by(way)(case.call)
            check_rotated(way, call(*case.given), expected, codec, tables, partials, what)
            calls[path] = _rotating(call, case.given)
            if plan.device.type == "cuda" and shape[0] <= _GRAPH_TOKENS:
                calls["graph" if path == "kernel" else f"{path} graph"] = _graph(call, case.given)
        times = time_alone(list(calls.values()), seconds=plan.seconds, device=plan.device)
        of_path = dict(zip(calls, times, strict=True))
        for path, t in of_path.items():
            row = _row(shape, name, case.name, path, t, case.moved, bandwidth)
            if path != "torch":
                row["speedup"] = round(of_path["torch"].median / t.median, 3)
            rows.append(row)
    return rows


def _ways(module: ModuleType | None, case: Case) -> dict[str, str]:
    """The rotation of each path by kernels: both, whichever the environment chooses."""
    if module is None:
        return {}
    ways = {"kernel": switches.BUTTERFLIES}
    if case.rotates and select.can_rotate_on_tensor_cores(module):
        ways["tensor-cores"] = switches.TENSOR_CORES
    return ways


def _rotating(call: Callable[..., object], given: tuple[Tensor, ...]) -> Call:
    """`call` with other copies of its inputs each time: on a GPU so many that none is in the L2."""
    copies = [given]
    if given[0].is_cuda:
        cache = 2 * torch.cuda.get_device_properties(given[0].device).L2_cache_size
        count = cache // max(sum(x.nbytes for x in given), 1)
        copies += [tuple(x.clone() for x in given) for _ in range(min(count, _MOST_COPIES))]
    inputs = itertools.cycle(copies)
    return lambda: call(*next(inputs))


def _graph(call: Callable[..., object], given: tuple[Tensor, ...]) -> Call:
    """The call as a CUDA graph, which replays without the cost of a launch from Python."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(*given)
    return graph.replay


def _copy(plan: Plan, values: Tensor) -> tuple[Times, int]:
    """A plain copy of `values`: its times, and the bytes that it moves."""
    out = torch.empty_like(values)
    [times] = time_alone(
        [_rotating(out.copy_, (values,))], seconds=plan.seconds, device=plan.device
    )
    return times, 2 * values.nbytes


def _copy_bandwidth(plan: Plan) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    count = _COPY_BYTES[plan.device.type] // 2
    times, moved = _copy(plan, torch.zeros(count, dtype=torch.bfloat16, device=plan.device))
    return 1000 * moved / times.median


def _row(
    shape: tuple[int, int],
    codec: str,
    operation: str,
    path: str,
    times: Times,
    moved: int,
    bandwidth: float,
) -> Row:
    rate = 1000 * moved / times.median
    return {
        **{"tokens": shape[0], "hidden": shape[1]},
        **{"codec": codec, "operation": operation, "path": path},
        "median_ms": round(times.median, 5),
        "p10_ms": round(times.p10, 5),
        "p90_ms": round(times.p90, 5),
        "calls": times.calls,
        "bytes": moved,
        "gb_s": round(rate / 1e9, 3),
        "copy_share": round(rate / bandwidth, 5),
    }


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """``512x4096,1x8192`` as (tokens, hidden) pairs.

    Raises:
        LowbitError: It is written otherwise, or a number is not above zero.
    """
    try:
        shapes = [[int(part) for part in shape.split("x")] for shape in text.split(",")]
    except ValueError:
        shapes = [[]]
    if any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise LowbitError(f"{text!r} is no list of shapes: write it like 512x4096,1x8192")
    return [(tokens, hidden) for tokens, hidden in shapes]


def machine(device: torch.device) -> dict[str, str]:
    """What was measured on: the device, and what its kernels are."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else cpu_name()
    threads = {} if on_gpu else {"threads": str(torch.get_num_threads())}
    return {"device": name, **threads, "kernels": kernels.describe(device.type)}
