"""Times of the codecs alone: encode, decode_sum and reduce_encode, by kernels and in plain torch.

A case is checked before it is timed: the kernels' bytes and sums must be those of plain torch, or
there is no figure. What counts is the bytes that must move, each input and output once, as a share
of the bandwidth of a plain copy in the same run. On a GPU every call takes another input, so many
that they do not fit its L2 cache, and short messages are timed under a CUDA graph, too.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lowbit import kernels
from megatron_lowbit.benchmark.timing import Call, Times, time_alone
from megatron_lowbit.codecs import Codec, Statistics, Tables, parse_codec
from megatron_lowbit.comm.tuning import cpu_name
from megatron_lowbit.errors import LowbitError

CODECS = ("rotated-hybrid-4", "rotated-hybrid-3", "rotated-hybrid-6", "static-hybrid", "fp8-g256")
SHAPES = {
    "cpu": [(1, 4096), (64, 4096), (512, 4096)],
    "cuda": list(itertools.product((1, 16, 64, 512, 4096, 16384), (576, 2048, 4096, 5120, 8192))),
}
SHAPES["cuda"] += [(tokens, 12288) for tokens in (1, 16, 64, 512, 4096)]
_GRAPH_TOKENS = 64  # up to so many a launch costs more than the work
_COPY_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}  # beyond the caches
_PERIOD = 257  # tokens of the partials, which repeat: a prime, so that a wrong row is seen

_MOST_COPIES = 4096

Row = dict


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        codecs: By their names in results: ``rotated-hybrid-4``.
        shapes: Of messages, (tokens, hidden).
        ranks: Payloads that a sum has.
        seconds: For each case.
        device: Where.
    """

    codecs: tuple[str, ...]
    shapes: list[tuple[int, int]]
    ranks: int
    seconds: float
    device: torch.device


@dataclass(frozen=True)
class _Case:
    """One operation of a codec at one shape: what it takes, and the bytes that it must move."""

    name: str
    call: Callable[[Tensor], Tensor]
    given: Tensor
    moved: int


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
            partials = _partials(plan, shape)
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
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < 4 else c.rjust(w)
            for i, (c, w) in enumerate(zip(ln, widths, strict=True))
        )
        for ln in lines
    )


def _measure(plan, shape, name: str, codec: Codec, partials: list[Tensor], bandwidth) -> list[Row]:
    """Every operation of one codec at one shape: by kernels, in plain torch, in a CUDA graph."""
    tables = _tables(codec, partials)
    has_kernel = codec.kernels(partials[0], tables) is not None
    rows = []
    for case in _cases(codec, tables, partials):
        plain = _unhelped(case.call)
        _check(case, plain, f"{name} {case.name} at {shape[0]} x {shape[1]}")
        calls = {"torch": _rotating(plain, case.given)}
        if has_kernel:
            calls["kernel"] = _rotating(case.call, case.given)
        if has_kernel and plan.device.type == "cuda" and shape[0] <= _GRAPH_TOKENS:
            calls["graph"] = _graph(case)
        times = time_alone(list(calls.values()), seconds=plan.seconds, device=plan.device)
        of_path = dict(zip(calls, times, strict=True))
        for path, t in of_path.items():
            row = _row(shape, name, case.name, path, t, case.moved, bandwidth)
            if path != "torch":
                row["speedup"] = round(of_path["torch"].median / t.median, 3)
            rows.append(row)
    return rows


def _cases(codec: Codec, tables: Tables, partials: list[Tensor]) -> list[_Case]:
    payloads = torch.stack([codec.encode(x, tables, rank=r) for r, x in enumerate(partials)])
    partial, out = partials[0], torch.empty_like(partials[0])
    sent, received, dense = payloads[0].nbytes, payloads.nbytes, partial.nbytes
    cases = [
        _Case("encode", lambda x: codec.encode(x, tables), partial, dense + sent),
        _Case(
            f"decode_sum of {len(partials)}",
            lambda rows: codec.decode_sum(rows, tables, out=out),
            payloads,
            received + dense,
        ),
    ]
    if not codec.needs_statistics or tables.of_sum is not None:
        cases.append(
            _Case(
                f"reduce_encode of {len(partials)}",
                lambda rows: codec.reduce_encode(rows, tables),
                payloads,
                received + sent,
            )
        )
    return cases


def _unhelped(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def plain(given: Tensor) -> Tensor:
        with kernels.disabled():
            return call(given)

    return plain


def _check(case: _Case, plain: Callable[[Tensor], Tensor], what: str) -> None:
    expected = plain(case.given).clone()
    got = case.call(case.given)
    if not torch.equal(got, expected):
        place = (got != expected).nonzero()[0].tolist()
        raise LowbitError(f"wrong result of {what}: kernel and plain torch differ first at {place}")


def _rotating(call: Callable[[Tensor], Tensor], given: Tensor) -> Call:
    """`call` with another copy of its input each time: on a GPU so many that none is in the L2."""
    copies = [given]
    if given.is_cuda:
        cache = 2 * torch.cuda.get_device_properties(given.device).L2_cache_size
        copies += [given.clone() for _ in range(min(cache // max(given.nbytes, 1), _MOST_COPIES))]
    inputs = itertools.cycle(copies)
    return lambda: call(next(inputs))


def _graph(case: _Case) -> Call:
    """The case as a CUDA graph, which replays without the cost of a launch from Python."""
    case.call(case.given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.call(case.given)
    return graph.replay


def _copy(plan: Plan, values: Tensor) -> tuple[Times, int]:
    """A plain copy of `values`: its times, and the bytes that it moves."""
    out = torch.empty_like(values)
    [times] = time_alone([_rotating(out.copy_, values)], seconds=plan.seconds, device=plan.device)
    return times, 2 * values.nbytes


def _copy_bandwidth(plan: Plan) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    count = _COPY_BYTES[plan.device.type] // 2
    times, moved = _copy(plan, torch.zeros(count, dtype=torch.bfloat16, device=plan.device))
    return 1000 * moved / times.median


def _partials(plan: Plan, shape: tuple[int, int]) -> list[Tensor]:
    """BF16 ``[tokens, hidden]`` of each rank, seeded."""
    tokens, hidden = shape
    period = min(tokens, _PERIOD)
    partials = []
    for rank in range(plan.ranks):
        generator = torch.Generator().manual_seed(rank)
        base = torch.randn(period, hidden, generator=generator).to(torch.bfloat16)
        partials.append(base.repeat(-(-tokens // period), 1)[:tokens].to(plan.device))
    return partials


def _tables(codec: Codec, partials: list[Tensor]) -> Tables:
    """Tables as a calibration on the first tokens of these partials makes them."""
    statistics = Statistics.of(torch.stack([x[:_PERIOD].cpu() for x in partials]))
    hidden = partials[0].shape[1]
    count = codec.default_bf16_features(hidden)
    index = statistics.ranges.sum(dim=0).argsort(descending=True)[:count]
    tables = codec.tables(hidden, bf16_index=index, statistics=statistics)
    return tables.to(partials[0].device)


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
        shapes = [tuple(int(part) for part in shape.split("x")) for shape in text.split(",")]
    except ValueError:
        shapes = [()]
    if any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise LowbitError(f"{text!r} is no list of shapes: write it like 512x4096,1x8192")
    return shapes


def machine(device: torch.device) -> dict[str, str]:
    """What was measured on: the device, and what its kernels are."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else cpu_name()
    threads = {} if on_gpu else {"threads": str(torch.get_num_threads())}
    return {"device": name, **threads, "kernels": kernels.describe(device.type)}
