"""Evaluation of a checkpoint under several codecs: what tools/evaluate.py does, step by step."""

import argparse
from pathlib import Path

from torch import nn

from megatron_lowbit import cli
from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.calibration.index_files import manifest_digest, read_index
from megatron_lowbit.comm.agreement import on_every_rank, require_equal
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.evaluation_loop import Evaluation, evaluate
from megatron_lowbit.evaluation.inputs import (
    Inputs,
    check_options,
    read_inputs,
    text_sequences,
)
from megatron_lowbit.evaluation.journal import Entry, Journal
from megatron_lowbit.evaluation.measures.measure import Measure
from megatron_lowbit.evaluation.measures.sync_error import SyncError, extremes
from megatron_lowbit.evaluation.output import Setting, summary, write_summary
from megatron_lowbit.evaluation.text_tables import tables
from megatron_lowbit.evaluation.variants import Named, Variants, default_variants, parse_variant
from megatron_lowbit.files import check_output
from megatron_lowbit.integration.arguments import INDEX_NAME
from megatron_lowbit.integration.assignment import check_index, whole_identity
from megatron_lowbit.integration.loops.checks import check_parallel, megatron_argv
from megatron_lowbit.integration.runtime import session
from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args
from megatron_lowbit.integration.runtime.pipeline import summing_of_stages
from megatron_lowbit.integration.runtime.sharing import Sharing, sharing
from megatron_lowbit.json_files import digest
from megatron_lowbit.model.summing import Summing

SYNC_SEQUENCES = 4  # of the first text, for the error at sync points


def run(options: argparse.Namespace, argv: list[str]) -> None:
    """Evaluate as `options` of tools/evaluate.py say, print the tables, write the JSON."""
    chosen = _named(options.codecs.split(",")) if options.codecs is not None else {}
    if options.resume and not options.output:
        raise LowbitError("--resume needs --output: what was measured is kept beside it")
    check_options(options)
    args = parse_megatron_args(megatron_argv(argv, options.simulate_tp))
    check_parallel(args)
    session.initialize(args)
    index, inputs = on_every_rank(lambda: _read(args, options))
    texts = [(name, corpus.sha256) for name, corpus in inputs.texts.items()]
    require_equal("calibration index or text", (manifest_digest(index.manifest), texts))
    chosen = chosen or _named(default_variants(index))
    model = session.load_whole_model(args)
    # Only errors that are carried need the chain that calibration found.
    chained = index if any(named.has_feedback for named in chosen.values()) else None
    summing, _ = summing_of_stages(model, options.simulate_tp, chained)
    on_every_rank(
        lambda: check_index(
            index,
            model,
            [codec for named in chosen.values() for codec in named.codecs(index)],
            summing.ranks,
        )
    )
    variants = on_every_rank(lambda: Variants(chosen, summing, index))
    measures = {"sync_points": _sync_errors(options, inputs, variants), **inputs.measures}
    journal = _journal(options, index, model, variants, measures, sharing(args))
    done = _start(journal, measures, options.resume)
    evaluation = _evaluate(args, inputs, model, variants, measures, journal, done)
    setting = _setting(options, index, summing, chosen)
    content = summary(setting, measures, evaluation)
    _report(content)
    on_every_rank(lambda: _write(content, options.output, journal))
    session.shutdown()


def _sync_errors(options: argparse.Namespace, inputs: Inputs, variants: Variants) -> list[Measure]:
    """The error at sync points, on the first text if there is one."""
    return [
        SyncError(
            text_sequences(corpus, options)[:SYNC_SEQUENCES, :-1],
            [(point.layer, point.name) for point in variants.summing.everywhere],
            observing=variants.observing,
            sha256=corpus.sha256,
            first=variants.summing.first,
        )
        for corpus in list(inputs.texts.values())[:1]
    ]


def _read(args: argparse.Namespace, options: argparse.Namespace) -> tuple[CalibrationIndex, Inputs]:
    """The index and all that is measured on."""
    if args.tensor_model_parallel_size == 1 and (options.simulate_tp or 1) == 1:
        raise LowbitError(
            "tensor parallel size 1 communicates nothing: nothing to compare; --simulate-tp N "
            "compares as N ranks would"
        )
    if options.output:
        check_output(options.output)
    index = read_index(options.index or Path(options.load) / INDEX_NAME)
    return index, read_inputs(
        options,
        args.max_position_embeddings,
        tokenize=session.build_tokenizer(args).tokenize,
        tokenizer=session.build_tokenizer(args, special_tokens=False),
    )


def _named(variants: list[str]) -> dict[str, Named]:
    return {name: parse_variant(name) for name in variants}


def _journal(
    options: argparse.Namespace,
    index: CalibrationIndex,
    model: nn.Module,
    variants: Variants,
    measures: dict[str, list[Measure]],
    shared: Sharing,
) -> Journal | None:
    """The journal of this evaluation, beside its output; none without an output."""
    summing = variants.summing
    identity = {
        "index": manifest_digest(index.manifest),
        "model": whole_identity(model, summing.stages),
        "dtype": str(summing.points[0].module.weight.dtype),  # type: ignore[attr-defined]
        "variants": ",".join(variants.reducers),
        "tensor parallel size": summing.ranks,
        "simulated": summing.is_simulated,
        **{measure.name: measure.identity for group in measures.values() for measure in group},
    }
    if summing.stages.count > 1:  # where they end, chains end
        identity["stages"] = summing.stages.gather(len(summing.points))
    require_equal("model, data or arguments", digest(identity))
    if not options.output:
        return None
    output = options.output.absolute()
    return Journal(
        output.with_name(f".{output.name}.partial"),
        identity,
        dp_group=shared.group,
        tp_group=shared.together,
        stages=summing.stages,
    )


def _start(
    journal: Journal | None, measures: dict[str, list[Measure]], resume: bool
) -> list[Entry]:
    """The units that were finished before."""
    done = journal.start(resume=resume) if journal else []
    if resume:
        total = sum(len(measure) for group in measures.values() for measure in group)
        cli.say(f"going on after {len(done)} of {total} units" if done else "nothing to resume")
    return done


def _evaluate(
    args: argparse.Namespace,
    inputs: Inputs,
    model: nn.Module,
    variants: Variants,
    measures: dict[str, list[Measure]],
    journal: Journal | None,
    done: list[Entry],
) -> Evaluation:
    """Run the loop, from where the journal stands."""
    group = variants.summing.points[0].group
    language_model = session.language_model(
        args, model, inputs.tokenizer, group=group, prefix=inputs.prefix
    )
    return evaluate(
        [measure for group in measures.values() for measure in group],
        language_model,
        variants.all(),
        journal=journal,
        done=done,
        dp_group=sharing(args).group,
        track=cli.progress,
    )


def _setting(
    options: argparse.Namespace, index: CalibrationIndex, summing: Summing, chosen
) -> Setting:
    return Setting(
        model=options.name or Path(options.load).name,
        tp_size=summing.ranks,
        simulated=summing.is_simulated,
        index_sha256=manifest_digest(index.manifest),
        sync_points=len(summing.everywhere),
        hidden=index.hidden,
        collectives={name: named.collective for name, named in chosen.items()},
    )


def _report(content: dict) -> None:
    """The results for people."""
    for table in tables(content):
        cli.say(table + "\n")
    for line in extremes(content["sync_points"]["points"]):
        cli.say(f"largest errors at sync points: {line}")


def _write(content: dict, output: Path | None, journal: Journal | None) -> None:
    """Write the JSON; then what was kept for --resume has served."""
    if output is None or cli.RANK != 0:
        return
    write_summary(content, output)
    assert journal is not None, "there is one beside an output"
    journal.clear()
