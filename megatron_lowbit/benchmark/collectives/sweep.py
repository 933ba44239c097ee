"""The sweep over message sizes, codecs and collectives: what every rank does, and who starts it.

`run(plan)` starts the ranks, behind links or on loopback, and returns what they measured; `measure`
is for a process that is a rank already, as under torchrun. Nothing is timed before its result is
checked (`benchmark.collectives.correctness`); a wrong result ends the sweep with a `LowbitError`.
"""

import contextlib
import json
import os
import pickle
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lowbit import cli
from megatron_lowbit.benchmark.collectives import correctness
from megatron_lowbit.benchmark.collectives.collective_cases import (
    Buffers,
    Policies,
    make_case,
    make_policies,
)
from megatron_lowbit.benchmark.collectives.correctness import Partials
from megatron_lowbit.benchmark.collectives.links import emulated_links, parse_rate
from megatron_lowbit.benchmark.collectives.ranks import plain_ranks
from megatron_lowbit.benchmark.collectives.sweep_plan import (
    SCATTERS,
    Plan,
    Variant,
    check_node_size,
    parse_codec,
    shape_of,
)
from megatron_lowbit.benchmark.timing import Times, time_calls, time_passes
from megatron_lowbit.comm.agreement import on_every_rank
from megatron_lowbit.comm.policy.making import take_tuning
from megatron_lowbit.comm.policy.timings import BF16_BYTES, Kind
from megatron_lowbit.comm.policy.tuning import this_machine, write_tuning
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import import_path


@dataclass
class Measured:
    """What a sweep gives.

    Attributes:
        rows: A dict per size and variant: ranks, link, bytes, codec, collective, median_ms, p10_ms,
            p90_ms, native_median_ms, speedup.
        machine: Device and backend, as a tuning file names them.
        versions: Of Python and torch.
        choices: Which collective each ``auto`` took: [codec, bytes, collective].
        calls: Timed calls of each row.
    """

    rows: list[dict]
    machine: dict[str, str]
    versions: dict[str, str]
    choices: list[list] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)


def run(plan: Plan, *, quiet: bool = False) -> Measured:
    """Start the plan's ranks, let them measure, and return what they measured.

    Args:
        plan: With a number of ranks.
        quiet: Leave out the line that rank 0 prints after each size.

    Raises:
        LowbitError: A wrong result, links that cannot be made here, or a rank that ended.
    """
    assert plan.ranks is not None, "ranks that torchrun started call measure"
    ranks = plain_ranks(plan.ranks)
    if plan.link is not None:
        ranks = emulated_links(plan.ranks, parse_rate(plan.link))
    with tempfile.TemporaryDirectory(prefix="lowbit-sweep-") as name, ranks as started:
        directory = Path(name)
        (directory / "plan").write_bytes(pickle.dumps(plan))
        command = [sys.executable, "-m", __spec__.name, name, "quiet" if quiet else "say"]
        try:
            started.run(command, env={"PYTHONPATH": import_path()})
        except LowbitError:
            for failure in sorted(directory.glob("error-*")):
                raise LowbitError(failure.read_text()) from None
            raise
        return Measured(**json.loads((directory / "measured.json").read_bytes()))


@contextlib.contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the ranks of the environment, by NCCL on GPUs or Gloo on CPUs; yields the device."""
    if torch.cuda.is_available() and dist.is_nccl_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def measure(plan: Plan, *, device: torch.device, quiet: bool = False) -> Measured:
    """Measure `plan` on the ranks of the default group; call it on every one of them.

    Args:
        plan: Whose number of ranks is that of the group, or None.
        device: Where this rank's partials are.
        quiet: As for `run`.

    Raises:
        LowbitError: On every rank: a wrong result, or settings that do not serve this group.
    """
    if plan.node_size is not None:
        check_node_size(plan.node_size, dist.get_world_size())
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    measured = Measured([], this_machine(), versions)
    policies = make_policies(plan, device)
    with torch.inference_mode():
        for size in plan.sizes:
            _measure_size(plan, size, policies, measured, device)
            if not quiet:
                cli.say(_progress(plan, measured))
        if plan.write_tuning is not None:
            _write_tuning(plan, plan.write_tuning, device)
    return measured


def _write_tuning(plan: Plan, path: Path, device: torch.device) -> None:
    """Take times of the plan's codecs, with carries and without, and write them on rank 0."""
    kinds = []
    for codec in map(parse_codec, plan.tuned):
        tables = Partials(dist.get_world_size(), 1, plan.hidden, device).tables(codec)
        kinds += [
            Kind(codec, tables, carries=c) for c in ((False, True) if codec.carries else (False,))
        ]
    assert dist.group.WORLD is not None, "the ranks have started it"
    tuning = take_tuning(
        kinds,
        group=dist.group.WORLD,
        device=device,
        seconds=plan.seconds * len(plan.sizes) * 4 * len(kinds),
        sizes=plan.sizes,
        node_size=plan.node_size,
        link=plan.where,
    )
    on_every_rank(lambda: write_tuning(tuning, path) if dist.get_rank() == 0 else None)


def _measure_size(
    plan: Plan, size: int, policies: Policies, measured: Measured, device: torch.device
) -> None:
    """Check and time all variants at one size; scatters apart: ranks divide their tokens."""
    ranks = dist.get_world_size()
    scatters = [v for v in plan.measured if v.collective in SCATTERS]
    others = [v for v in plan.measured if v.collective not in SCATTERS]
    for variants, multiple in ((others, 1), (scatters, ranks)):
        if not variants:
            continue
        shape = shape_of(size, hidden=plan.hidden, multiple=multiple)
        partials = Partials(ranks, *shape, device)
        mine = partials.of_rank(dist.get_rank())
        buffers = Buffers(mine)
        cases = [make_case(v, partials, buffers, policies, plan) for v in variants]
        for case in cases:
            buffers.refill()
            correctness.check(
                case.call(),
                partials,
                start=case.start,
                expected=case.expected,
                floor=case.floor,
                case=_name(case.variant, shape),
            )
        times = (time_passes if plan.in_passes else time_calls)(
            [case.call for case in cases],
            seconds=plan.seconds,
            device=device,
            prepare=buffers.refill,  # sums of sums would grow to infinity
        )
        _add_rows(plan, variants, times, shape, policies, measured)


def _add_rows(
    plan: Plan,
    variants: list[Variant],
    times: list[Times],
    shape: tuple[int, int],
    policies: Policies,
    measured: Measured,
) -> None:
    size = BF16_BYTES * shape[0] * shape[1]
    medians = {v: round(t.median, 5) for v, t in zip(variants, times, strict=True)}
    for variant, t in zip(variants, times, strict=True):
        codec, collective = variant.label
        median, native = medians[variant], medians[variant.rival]
        row = {
            "ranks": dist.get_world_size(),
            "link": plan.where,
            "bytes": size,
            "codec": codec,
            "collective": collective,
            "median_ms": median,
            "p10_ms": round(t.p10, 5),
            "p90_ms": round(t.p90, 5),
            "native_median_ms": native,
            "speedup": round(native / median, 4),
        }
        measured.rows.append(row)
        measured.calls.append(t.calls)
        if collective == "auto":
            chosen = policies(variant).all_reduce(size // BF16_BYTES).collective
            measured.choices.append([codec, size, chosen])


def _name(variant: Variant, shape: tuple[int, int]) -> str:
    codec, collective = variant.label
    return f"{codec} {collective} on {shape[0]} x {shape[1]}"


def _progress(plan: Plan, measured: Measured) -> str:
    """A line on the size that was measured last: native and the fastest in low bits."""
    last = measured.rows[-1]["bytes"]
    rows = [row for row in measured.rows if row["bytes"] == last]
    low = [row for row in rows if not row["codec"].startswith("native")]
    text = f"{rows[0]['ranks']} ranks, {plan.where}, {last >> 10} KB: checked"
    if low:
        best = max(low, key=lambda row: row["speedup"])
        text += f"; best {best['speedup']:.2f}x, {best['codec']} {best['collective']}"
    return text


def _rank() -> None:
    """One of the processes that `run` starts."""
    directory, quiet = Path(sys.argv[1]), sys.argv[2] == "quiet"
    try:
        plan = pickle.loads((directory / "plan").read_bytes())
        with process_group() as device:
            measured = measure(plan, device=device, quiet=quiet)
    except LowbitError as error:
        # `run` says it, once for all ranks.
        (directory / f"error-{cli.RANK:03}").write_text(str(error))
        sys.exit(1)
    if cli.RANK == 0:
        (directory / "measured.json").write_text(json.dumps(asdict(measured)))


if __name__ == "__main__":
    cli.run(_rank)
