"""The steps of bench-all-reduce: options to plans, sweeps, what is told and written."""

import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from megatron_lowbit import cli
from megatron_lowbit.benchmark.collectives import sweep, sweep_plot, sweep_report
from megatron_lowbit.benchmark.collectives import sweep_plan as plans
from megatron_lowbit.benchmark.collectives.sweep import Measured
from megatron_lowbit.benchmark.collectives.sweep_plan import Plan
from megatron_lowbit.benchmark.plots import check_plot
from megatron_lowbit.comm.agreement import on_every_rank
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.files import check_output
from megatron_lowbit.integration.runtime.rendezvous import check_environment, muster


def run(options: Namespace) -> None:
    """Measure as the options of `all_reduce_command` say."""
    in_plans = make_plans(options)
    if in_plans[0].ranks is None:
        muster()
        with sweep.process_group() as device:
            on_every_rank(lambda: _prepare(options) if cli.RANK == 0 else None)
            sweeps = [sweep.measure(in_plans[0], device=device)]
        if cli.RANK == 0:
            _finish(options, sweeps)
        return
    _prepare(options)
    _finish(options, [sweep.run(plan) for plan in in_plans])


def make_plans(options: Namespace) -> list[Plan]:
    """A plan for each number of ranks.

    Raises:
        LowbitError: An option that cannot be; nothing has been started.
    """
    counts = _counts(options.ranks)
    if options.write_tuning and len(counts) > 1:
        raise LowbitError("a tuning file is for one number of ranks: give --ranks one")
    whole = Plan(
        variants=plans.choose_variants(
            codecs=_names(options.codecs),
            collectives=_names(options.collectives),
        ),
        sizes=plans.parse_sizes(options.sizes or plans.DEFAULT_SIZES),
        hidden=options.hidden,
        tuning=options.tuning,
        write_tuning=options.write_tuning,
        tuned=tuple(_names(options.codecs) or plans.TUNED),
        feedback=options.feedback,
        seconds=options.seconds,
        ranks=counts[0],
        link=options.link,
    )
    wants_nodes = any(v.collective == "hierarchical" for v in whole.variants)
    if options.node_size is None:
        if "hierarchical" in (_names(options.collectives) or ()):
            raise LowbitError("hierarchical needs the ranks of a node: give --node-size")
        return [replace(whole, ranks=count) for count in counts]
    if not wants_nodes and not any(v.collective == "auto" for v in whole.variants):
        raise LowbitError("--node-size means nothing without hierarchical or auto")
    return [_with_nodes(replace(whole, ranks=c), options.node_size, len(counts)) for c in counts]


def _with_nodes(plan: Plan, node_size: int, of_plans: int) -> Plan:
    """`plan` in nodes; of several numbers of ranks those that are not several nodes go without."""
    try:
        return replace(plan, node_size=node_size)
    except LowbitError as error:
        if of_plans == 1:
            raise
        cli.say(f"{error}: measured without hierarchical")
        return plan


def _counts(text: str | None) -> list[int | None]:
    """Numbers of ranks to start; None where torchrun has started them."""
    if text is None:
        check_environment()
        if "WORLD_SIZE" in os.environ:
            if int(os.environ["WORLD_SIZE"]) < 2:
                raise LowbitError("1 is no number of ranks: start 2 or more")
            return [None]
        return [2]
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise LowbitError(f"{text!r} is no number of ranks: write it like 4 or 2,4,8") from None
    return list(dict.fromkeys(counts))


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",")]


def _prepare(options: Namespace) -> None:
    """Find out now, and not after the work, that something cannot be written."""
    sweep_report.check_paths(options.output)
    if options.write_tuning is not None:
        check_output(options.write_tuning, "--write-tuning")
    if options.plot is not None:
        check_plot(options.plot)


def _finish(options: Namespace, sweeps: list[Measured]) -> None:
    rows = [row for measured in sweeps for row in measured.rows]
    _print(rows, sweeps)
    written: list[Path] = []
    if options.output is not None:
        sweep_report.write(
            rows, options.output, sweep_report.describe(sweeps, sweep_report.command_line())
        )
        written += [options.output, sweep_report.meta_path(options.output)]
    if options.write_tuning is not None:
        written.append(options.write_tuning)
    if options.plot is not None:
        sweep_plot.draw(rows, options.plot)
        written.append(options.plot)
    if written:
        cli.say(f"\nwritten: {', '.join(map(str, written))}")


def _print(rows: list[dict], sweeps: list[Measured]) -> None:
    cli.say("\n" + sweep_report.tables(rows))
    for measured in sweeps:
        for line in sweep_report.choices(measured):
            cli.say(f"\n{measured.rows[0]['ranks']} ranks: {line}")
    lost = sweep_report.losses(rows)
    cli.say("\nslower than native:" + "".join(f"\n  {line}" for line in lost or ["no case"]))
    warning = sweep_report.unsteady(rows)
    if warning:
        cli.say(f"\n{warning}")
