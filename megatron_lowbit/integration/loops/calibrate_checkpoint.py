"""Calibration of a Megatron checkpoint: what tools/calibrate.py does, step by step.

Each sync point's partials and their native sum are watched (`integration.sums.over_ranks`), so the
model runs exactly as without calibration.
"""

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megatron_lowbit import cli
from megatron_lowbit.calibration.assemble import assemble
from megatron_lowbit.calibration.calibration_loop import Observations, calibrate
from megatron_lowbit.calibration.corpus import Corpus, poverty, read_corpus
from megatron_lowbit.calibration.index import CalibrationIndex, collapsed
from megatron_lowbit.calibration.index_files import (
    FORMAT_VERSION,
    check_destination,
    write_index,
)
from megatron_lowbit.calibration.planning import with_recipe
from megatron_lowbit.calibration.saved_state import Checkpointer, Progress
from megatron_lowbit.calibration.statistics import RunningStatistics
from megatron_lowbit.codecs import Codec
from megatron_lowbit.comm.agreement import on_every_rank, require_equal
from megatron_lowbit.integration.arguments import INDEX_NAME
from megatron_lowbit.integration.assignment import whole_identity
from megatron_lowbit.integration.loops.checks import (
    check_length,
    check_parallel,
    check_recipe,
    feature_count,
    megatron_argv,
)
from megatron_lowbit.integration.runtime import session
from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args
from megatron_lowbit.integration.runtime.pipeline import at_once, run_each, summing_of_stages
from megatron_lowbit.integration.runtime.sharing import sharing
from megatron_lowbit.integration.sums.chain_check import check_chain
from megatron_lowbit.model.forward import device_of
from megatron_lowbit.model.summing import Summing

_POOR = "its means and variances say little of other texts: calibrate on a more varied one"


def run(options: argparse.Namespace, codec: Codec, argv: list[str]) -> None:
    """Calibrate as `options` of tools/calibrate.py say, and write the index."""
    args = parse_megatron_args(megatron_argv(argv, options.simulate_tp))
    check_parallel(args)
    check_recipe(options, args)
    output = (options.output or Path(options.load) / INDEX_NAME).absolute()
    session.initialize(args)
    bf16_features = on_every_rank(
        lambda: feature_count(options.bf16_features, args.hidden_size, codec)
    )
    on_every_rank(lambda: check_destination(output))
    corpus, sequences = on_every_rank(lambda: _read(args, options))
    model = session.load_whole_model(args)
    cli.say(f"{options.sequences} sequences of {options.seq_length} tokens")
    poor = poverty(sequences)
    if poor:
        cli.say(f"warning: {poor}; {_POOR}")
    partial = output.with_name(f".{output.name}.partial")
    index, progress = calibrate_model(
        model,
        sequences,
        codec=codec,
        bf16_features=bf16_features,
        corpus=_describe(corpus, options),
        partial=partial,
        resume=options.resume,
        simulate_tp=options.simulate_tp,
    )
    if options.budget is not None or options.target_loss is not None:
        skipped = {int(re.findall(r"^sequence (\d+)", text)[0]) for text in progress.skipped}
        finite = [n for n in range(len(sequences)) if n not in skipped]
        index = _plan(args, options, model, index, sequences[finite])
    on_every_rank(lambda: write_index(index, output) if dist.get_rank() == 0 else None)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    _report(progress, index, output)
    flat, points = collapsed(index)
    if not poor and 2 * flat > points:
        cli.say(f"warning: hardly any variance at {flat} of {points} sync points; {_POOR}")
    session.shutdown()


def _plan(
    args: argparse.Namespace,
    options: argparse.Namespace,
    model: nn.Module,
    index: CalibrationIndex,
    sequences: Tensor,
) -> CalibrationIndex:
    """The index with the recipe that was asked for."""
    summing, _ = summing_of_stages(model, options.simulate_tp, index)
    tokenizer = session.build_tokenizer(args)
    return with_recipe(
        index,
        model,
        session.language_model(args, model, tokenizer, group=summing.points[0].group),
        summing,
        sequences,
        budget=options.budget,
        target=options.target_loss,
        skip=options.skip or 0,
        dp_group=sharing(args).group,
    )


def calibrate_model(
    model: nn.Module,
    sequences: Tensor,
    *,
    codec: Codec,
    bf16_features: int,
    corpus: dict,
    partial: Path,
    resume: bool = False,
    simulate_tp: int | None = None,
) -> tuple[CalibrationIndex, Progress]:
    """Run sequences through a model and make its index; call it on every rank.

    Args:
        model: A GPTModel of the local spec, its weights loaded (`session.load_whole_model`).
        sequences: int64 ``[n, seq_length]``, the same on every rank.
        codec: The codec that the index is for.
        bf16_features: How many features of a sync point travel in BF16.
        corpus: What the manifest says of the corpus; with the model it identifies the run.
        partial: Directory for the state that `resume` goes on from; left in place.
        resume: Go on from it; otherwise what is there is removed.
        simulate_tp: Be as so many tensor-parallel ranks; `model` has one.

    Returns:
        The index, the same on every rank, and what was done and left out.

    Raises:
        LowbitError: On every rank: no finite sequence, or a state of another run to resume.
    """
    from megatron.core import parallel_state

    summing, native = summing_of_stages(model, simulate_tp)
    for name, reason in native.items():
        cli.say(f"not observed: {name} ({reason})")
    identity: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "model": whole_identity(model, summing.stages),
        "tp_size": summing.ranks,
        "corpus": corpus,
    }
    # A row for each partial here, by rank and sync point, then a row for each sum.
    rows = (summing.here + 1) * len(summing.points)
    statistics = RunningStatistics(rows, identity["model"]["hidden_size"])
    groups: dict[str, Any] = {
        "dp_group": parallel_state.get_data_parallel_group(),
        "tp_group": summing.points[0].group,
        "stages": summing.stages,
    }
    run_identity = {**identity, "simulated": summing.is_simulated}
    if summing.stages.count > 1:  # each keeps the state of its own sync points
        run_identity["stages"] = summing.stages.gather(len(summing.points))
    checkpointer = Checkpointer(partial, run_identity, **groups)
    require_equal("model, corpus or arguments", checkpointer.identity)
    progress = _start(checkpointer, statistics, resume)
    _observe_all(model, summing, sequences, statistics, checkpointer, progress, groups)
    index = assemble(summing, statistics, identity, progress, codec, bf16_features)
    index.manifest["chain"] = check_chain(model, summing, sequences[0].to(device_of(model)))
    # Made in inference mode, its buffers could not be written to by a plan's backward pass.
    parallel_state.get_global_memory_buffer().buffer.clear()
    return index, progress


def _read(args: argparse.Namespace, options: argparse.Namespace) -> tuple[Corpus, Tensor]:
    check_length(args, options.seq_length)
    corpus = read_corpus(options.data, session.build_tokenizer(args).tokenize)
    return corpus, corpus.sample(options.sequences, options.seq_length, seed=options.seed)


def _describe(corpus: Corpus, options: argparse.Namespace) -> dict:
    return {
        "files": corpus.names,
        "sha256": corpus.sha256,
        "tokens": len(corpus.tokens),
        "sequences": options.sequences,
        "seq_length": options.seq_length,
        "seed": options.seed,
    }


def _start(checkpointer: Checkpointer, statistics: RunningStatistics, resume: bool) -> Progress:
    if resume:
        progress = checkpointer.load(statistics)
        if progress.done:
            cli.say(f"going on after {progress.done} sequences")
        else:
            cli.say("nothing to resume: starting with the first sequence")
        return progress
    dist.barrier()
    if dist.get_rank() == 0:
        checkpointer.clear()
    dist.barrier()
    return Progress()


def _observe_all(
    model: nn.Module,
    summing: Summing,
    sequences: Tensor,
    statistics: RunningStatistics,
    checkpointer: Checkpointer,
    progress: Progress,
    groups: dict[str, Any],
) -> None:
    """Run the sequences through the model with observers in place."""
    names, count = [str(point) for point in summing.points], len(summing.points)
    names = names * summing.here + [f"{name} (sum)" for name in names]
    observations = Observations(names, statistics.state.shape[-1])
    observers = [observations.observer(row) for row in range(len(names))]

    def watch(point: int, partial: Tensor, total: Tensor) -> None:
        rows = [*summing.partials(partial), total]
        for observe, values in zip(observers[point::count], rows, strict=True):
            observe(values)

    with summing.watching(watch):
        calibrate(
            sequences,
            lambda several: run_each(model, several),
            observations,
            statistics,
            checkpointer=checkpointer,
            progress=progress,
            **groups,
            device=device_of(model),
            at_once=at_once(model),
            track=cli.progress("calibrating", "round"),
        )


def _report(progress: Progress, index: CalibrationIndex, output: Path) -> None:
    for message in progress.skipped[:10]:
        cli.say(f"warning: left out {message}")
    if len(progress.skipped) > 10:
        cli.say(f"warning: left out {len(progress.skipped) - 10} more sequences")
    codec = index.manifest["codec"]
    cli.say(
        f"wrote {output}: {progress.done - len(progress.skipped)} sequences, for {codec['name']} "
        f"with {codec['bf16_features']} of {index.hidden} features in BF16"
    )
    recipe = index.manifest.get("recipe")
    if recipe:
        cli.say(
            f"recipe: {recipe['bits_per_value']:.2f} bits a value on average, "
            f"{recipe['sum_bits_per_value']:.2f} of sums, errors carried, predicted to cost "
            f"{recipe['predicted_divergence']:.4f} nats of KL divergence one-shot, "
            f"{recipe['predicted_two_shot']:.4f} two-shot"
        )
