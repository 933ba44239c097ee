"""What the doctor does on every rank, step by step, and what rank 0 says of it."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lowbit import cli
from megatron_lowbit.benchmark.collectives.sweep import process_group
from megatron_lowbit.benchmark.doctor.doctor_advice import (
    Pass,
    advice,
    expected,
    passes,
    table,
    undecided,
)
from megatron_lowbit.benchmark.doctor.doctor_checks import check_bits, group_lines
from megatron_lowbit.codecs import DEFAULT_CODEC, get_codec
from megatron_lowbit.comm.agreement import on_every_rank
from megatron_lowbit.comm.policy.making import candidates, take_tuning
from megatron_lowbit.comm.policy.runs import LARGEST
from megatron_lowbit.comm.policy.timings import BF16_BYTES, ByTimes, Kind
from megatron_lowbit.comm.policy.tuning import Tuning, write_tuning

# Of a model that is not there.
HIDDEN, LONGEST, BITS = 4096, 4096, (4, 2)


def links_alone(seconds: float) -> None:
    """Examine the ranks that torchrun started, with messages of no model."""
    with process_group() as device:
        group = dist.group.WORLD
        assert group is not None, "torchrun has started it"
        for bits, found in examine_links(group, device, seconds).items():
            head = f"{DEFAULT_CODEC} in {bits} bits, errors carried:"
            cli.say("\n".join(["", head, *table(found), *undecided(found)]))
        cli.say(
            "\nA sum each; a model has two a layer. Next: calibrate a checkpoint, and ask again "
            "with --load CKPT."
        )


def examine_links(
    group: dist.ProcessGroup, device: torch.device, seconds: float
) -> dict[int, list[Pass]]:
    """Say what joins the ranks, and time single sums: the passes by each of `BITS`."""
    cli.say("\n".join(group_lines(group, device)))
    kinds = []
    for bits in BITS:
        codec = get_codec(DEFAULT_CODEC, bits=bits)
        kinds.append(Kind(codec, codec.tables(HIDDEN, device=device), carries=True))
    ways = candidates(kinds)
    cli.say(check_bits(kinds, ways, group, device))
    found, each = {}, seconds / len(BITS)
    for bits, kind in zip(BITS, kinds, strict=True):
        tuning = take_tuning([kind], group=group, device=device, seconds=each, scatters=False)
        times = ByTimes(tuning.timings, [kind], ways, source=repr(kind.codec))
        found[bits] = passes(times, HIDDEN, LONGEST)
    return found


def with_model(
    checkpoint: str, argv: Sequence[str], output: Path, *, ranks: int, seconds: float
) -> None:
    """Examine a checkpoint's model on the ranks that torchrun started, and write a tuning file."""
    from megatron_lowbit.benchmark.doctor.doctor_model import load_sums
    from megatron_lowbit.integration.runtime import session

    model = load_sums(checkpoint, argv, ranks)
    cli.say("\n".join(group_lines(model.group, model.device)))
    cli.say(f"model    {model.about}")
    ways = candidates(model.kinds)
    cli.say(check_bits(model.kinds, ways, model.group, model.device))
    tuning = take_tuning(
        model.kinds,
        group=model.group,
        device=model.device,
        seconds=seconds,
        largest=min(LARGEST, max(model.longest, 64) * model.hidden * BF16_BYTES),
        scatters=model.scatters,
    )
    times = ByTimes(tuning.timings, model.kinds, ways, source=output.name)
    found = passes(times, model.hidden, model.longest, skipped=model.skipped)
    cli.say("\n".join(["", *table(found), "", *expected(found), "", *model.layers, ""]))
    written = _write(tuning, output, model.calibrate)
    cli.say("\n".join(advice(found, written, model.calibrate)))
    session.shutdown()


def _write(tuning: Tuning, output: Path, calibrate: str | None) -> str | None:
    """The tuning file, on rank 0; not of codecs that the model will not have once calibrated."""
    if calibrate is not None:
        return None
    on_every_rank(lambda: write_tuning(tuning, output) if cli.RANK == 0 else None)
    return str(output)
