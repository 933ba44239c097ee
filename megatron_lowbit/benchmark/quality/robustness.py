"""What tools/robustness.py does: how divergence from native communication moves with calibration.

The model is loaded once and runs as N simulated tensor-parallel ranks. It is calibrated on each of
`CALIBRATIONS`; then every sequence of the held-out texts runs natively once and through each codec
of each calibration. What is done is kept beside the output until the whole is:

    .FILE.partial/KIND-N-SEED/  the index of a calibration
    .FILE.partial/evaluation/   journal of the evaluation
"""

import argparse
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from megatron_lowbit import cli
from megatron_lowbit.benchmark.quality.robustness_plan import (
    BUDGET,
    CALIBRATIONS,
    CODECS,
    SEQ_LENGTH,
    Calibration,
    read_texts,
)
from megatron_lowbit.benchmark.quality.robustness_results import to_json
from megatron_lowbit.benchmark.quality.robustness_table import NOTES, tables
from megatron_lowbit.calibration.index import CalibrationIndex
from megatron_lowbit.calibration.index_files import manifest_digest, read_index, write_index
from megatron_lowbit.calibration.planning import with_recipe
from megatron_lowbit.codecs import CALIBRATED_CODEC, get_codec
from megatron_lowbit.comm.agreement import on_every_rank, require_equal
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.evaluation_loop import evaluate
from megatron_lowbit.evaluation.journal import Journal
from megatron_lowbit.evaluation.measures.text import Text
from megatron_lowbit.evaluation.output import write_summary
from megatron_lowbit.evaluation.variants import Variants, parse_variant
from megatron_lowbit.files import check_output
from megatron_lowbit.integration.assignment import check_index
from megatron_lowbit.integration.loops.calibrate_checkpoint import calibrate_model
from megatron_lowbit.integration.loops.checks import check_length, megatron_argv, refuse_pipeline
from megatron_lowbit.integration.runtime import session
from megatron_lowbit.integration.runtime.megatron_args import parse_megatron_args
from megatron_lowbit.integration.sums.simulate import find_summing
from megatron_lowbit.model.language_model import LanguageModel


@dataclass(frozen=True)
class _Loaded:
    """The model, and where what is done is kept."""

    module: nn.Module
    model: LanguageModel
    hidden: int
    simulate_tp: int
    state: Path


def run(
    options: argparse.Namespace,
    argv: list[str],
    *,
    examples: Path,
    calibrations: list[Calibration] = CALIBRATIONS,
) -> None:
    """Calibrate, measure, print the tables and write the JSON; `argv` is for Megatron.

    The directory `examples` has emma.txt, persuasion.txt and kjv.txt.
    """
    args = parse_megatron_args(megatron_argv(argv, options.simulate_tp))
    refuse_pipeline(args)
    session.initialize(args)
    output = options.output.absolute()
    state = output.with_name(f".{output.name}.partial")
    on_every_rank(lambda: _prepare(output, state, options.resume))
    on_every_rank(lambda: check_length(args, SEQ_LENGTH))
    tokenizer = on_every_rank(lambda: session.build_tokenizer(args))
    texts = on_every_rank(lambda: read_texts(tokenizer.tokenize, examples, tokens=options.tokens))
    require_equal("texts", texts.digests)
    samples = on_every_rank(lambda: {c: texts.sample(c) for c in calibrations})
    loaded = _load(args, tokenizer, state, options.simulate_tp)
    indexes = {c: _index(loaded, c, texts.corpora[c.kind].sha256, samples[c]) for c in calibrations}
    summaries = _measure(loaded, indexes, texts.held_out, options.resume)
    content = to_json(options, indexes, summaries)
    cli.say(f"{tables(content)}\n\n{NOTES}")
    on_every_rank(lambda: _write(content, output, state))
    session.shutdown()


def _load(args: argparse.Namespace, tokenizer, state: Path, simulate_tp: int) -> _Loaded:
    module = session.load_model(args)
    summing, _ = on_every_rank(lambda: find_summing(module, simulate_tp))
    model = session.language_model(args, module, tokenizer, group=summing.points[0].group)
    return _Loaded(module, model, args.hidden_size, simulate_tp, state)


def _prepare(output: Path, state: Path, resume: bool) -> None:
    """Check, on one rank, where the results go, and remove what is not to be resumed."""
    if dist.get_rank() != 0:
        return
    check_output(output)
    if not resume:
        shutil.rmtree(state, ignore_errors=True)


def _index(
    loaded: _Loaded, calibration: Calibration, sha256: str, sequences: Tensor
) -> CalibrationIndex:
    """The index of a calibration: the one that is kept, or a new one."""
    directory = loaded.state / calibration.name
    corpus = {"sha256": sha256, "seq_length": SEQ_LENGTH, **asdict(calibration)}
    if not directory.exists():
        cli.say(f"calibration {calibration.name}")
        index = _calibrate(loaded, corpus, sequences)
        on_every_rank(lambda: write_index(index, directory) if dist.get_rank() == 0 else None)
    return on_every_rank(lambda: _kept(loaded, directory, corpus))


def _calibrate(loaded: _Loaded, corpus: dict, sequences: Tensor) -> CalibrationIndex:
    """A new index, with a recipe."""
    codec = get_codec(CALIBRATED_CODEC)
    index, _ = calibrate_model(
        loaded.module,
        sequences,
        codec=codec,
        bf16_features=codec.default_bf16_features(loaded.hidden),
        corpus=corpus,
        partial=loaded.state / "calibration",
        simulate_tp=loaded.simulate_tp,
    )
    summing, _ = find_summing(loaded.module, loaded.simulate_tp)
    return with_recipe(
        index,
        loaded.module,
        loaded.model,
        summing,
        sequences,
        budget=BUDGET,
        target=None,
        dp_group=None,
    )


def _kept(loaded: _Loaded, directory: Path, corpus: dict) -> CalibrationIndex:
    """Read an index and check that it is of this run."""
    index = read_index(directory)
    if not corpus.items() <= index.manifest["corpus"].items():
        raise LowbitError(f"{directory} is of another text: run without --resume to start over")
    check_index(index, loaded.module, [get_codec("static-hybrid")], loaded.simulate_tp)
    return index


def _measure(
    loaded: _Loaded, indexes: dict[Calibration, CalibrationIndex], texts: list[Text], resume: bool
) -> dict[str, dict]:
    """Text -> its summary, with all codecs of all calibrations."""
    summing, _ = find_summing(loaded.module, loaded.simulate_tp)
    variants = []
    for calibration, index in indexes.items():
        named = {calibration.variant(codec): parse_variant(codec) for codec in CODECS}
        variants += Variants(named, summing, index).all()
    digests = {c.name: manifest_digest(index.manifest) for c, index in indexes.items()}
    identity = {"indexes": digests, **{text.name: text.identity for text in texts}}
    group = loaded.model.tp_group
    journal = Journal(loaded.state / "evaluation", identity, dp_group=None, tp_group=group)
    evaluation = evaluate(
        texts,
        loaded.model,
        variants,
        journal=journal,
        done=journal.start(resume=resume),
        dp_group=None,
        track=cli.progress,
    )
    return {summary["name"]: summary for summary in evaluation.summaries.values()}


def _write(content: dict, output: Path, state: Path) -> None:
    """Write the JSON; then what was kept for --resume has served."""
    if dist.get_rank() == 0:
        write_summary(content, output)
        shutil.rmtree(state, ignore_errors=True)
