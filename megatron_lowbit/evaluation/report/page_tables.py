"""Tables of the page: numbers as text, what is not there as such."""

from megatron_lowbit.evaluation.evaluation_schema import (
    AverageResult,
    Generation,
    LongContext,
    Number,
    PointError,
    SyncPoints,
    TaskResult,
    Text,
    TextResult,
)
from megatron_lowbit.evaluation.measures.sync_error import BELOW_MEDIAN_DB, LOW_DB
from megatron_lowbit.evaluation.report.findings import (
    CodecError,
    Comparison,
    Ratio,
    codec_errors,
)
from megatron_lowbit.evaluation.report.index_reader import (
    PointRanges,
    RecipePoint,
    by_kind,
    most_extreme,
    runs,
)
from megatron_lowbit.evaluation.report.page import Table
from megatron_lowbit.evaluation.report.results import ResultFile

NONE = "n/a"
_NAMED = 12  # sync points that are named of a codec; the others are counted
_OUTLIERS = 10  # rows of the table of outliers


def comparison(file: ResultFile, found: list[Comparison]) -> Table:
    """The best codec within the budget, and below each the paper's method."""
    head = ["text", "by", "codec", "bits/value", "loss, nats", "KL, nats"]
    head += ["loss ratio", "KL ratio"]
    rows = []
    for one in found:
        ratios = [ratio(one.ratio(metric)) for metric in ("delta_nll", "kl")]
        where = [one.text.name, one.variant.collective]
        rows.append([*where, *_quality(file, one.result), *(["", ""] if one.is_paper else ratios)])
        if one.paper is not None and not one.is_paper:
            rows.append(["", "", *_quality(file, one.paper), "1", "1"])
    return Table("", head, rows)


def _quality(file: ResultFile, result: TextResult) -> list[str]:
    return [
        result.variant,
        number(file.data.variant(result.variant).bits_per_value, 2),
        with_error(result.delta_nll, result.delta_nll_stderr),
        with_error(result.kl, result.kl_stderr),
    ]


def ratio(value: Ratio | None) -> str:
    """A ratio with its standard error."""
    return NONE if value is None else with_error(value.value, value.stderr, digits=2)


def tasks(file: ResultFile) -> Table:
    """Accuracy by task, the average, and what is kept of native's."""
    measured, average = file.data.tasks, file.data.task_average
    head = ["codec", *(f"{task.name} ({task.metric}, {task.items} items)" for task in measured)]
    head += ["average", "kept of BF16, % [95 % interval]"]
    native = ["native BF16", *(share(*task.score(task.native)) for task in measured)]
    rows = [[*native, share(average.native, average.native_stderr) if average else NONE, "100"]]
    averages = {one.variant: one for one in average.results} if average else {}
    for codec, results in _by_codec(file):
        cells = [
            share(*task.score(result)) if result else NONE
            for task, result in zip(measured, results, strict=True)
        ]
        rows.append([codec, *cells, *_average(averages.get(codec))])
    return Table(f"{file.label}: accuracy in %, ± standard error over items.", head, rows)


def task_differences(file: ResultFile) -> Table:
    """Accuracy less native's, by task."""
    head = ["codec", *(task.name for task in file.data.tasks)]
    rows = [
        [codec, *(share(one.difference, one.difference_stderr) if one else NONE for one in results)]
        for codec, results in _by_codec(file)
    ]
    caption = f"{file.label}: difference from native on the same items, in points of accuracy."
    return Table(caption, head, rows, is_folded=True)


def _by_codec(file: ResultFile) -> list[tuple[str, list[TaskResult | None]]]:
    """The codecs that did any task, and their result of each task."""
    results = [{one.variant: one for one in task.results} for task in file.data.tasks]
    codecs = (variant.name for variant in file.data.variants)
    rows = [(codec, [of_task.get(codec) for of_task in results]) for codec in codecs]
    return [(codec, of_codec) for codec, of_codec in rows if any(of_codec)]


def _average(result: AverageResult | None) -> list[str]:
    if result is None:
        return [NONE, NONE]
    kept = f"{share(result.kept)} [{share(result.kept_low)}, {share(result.kept_high)}]"
    return [share(result.average, result.average_stderr), kept]


def outliers(points: list[PointRanges]) -> Table:
    """The sync points whose widest feature stands out most."""
    head = ["layer", "sync point", "widest feature", "its range", "times the median"]
    head += ["in BF16", "widest feature left, times the median"]
    rows = []
    for point in most_extreme(points, _OUTLIERS):
        feature, widest, times = point.outlier
        chosen = "yes" if feature in point.bf16_index.tolist() else "no"
        cells = [f"{widest:,.0f}", f"{times:,.1f}", chosen, f"{point.left:,.1f}"]
        rows.append([str(point.layer), point.name, str(feature), *cells])
    return Table(f"The {len(rows)} sync points with the most extreme outliers.", head, rows)


def errors(file: ResultFile, measured: SyncPoints) -> Table:
    """SQNR by codec: the median, the worst, and every sync point that stands out."""
    head = ["codec", "median, dB", "worst sync point", "worst token", "standing out: layer (dB)"]
    rows = []
    for error in codec_errors(measured):
        worst = f"{error.worst.sqnr[error.codec]:.1f} dB: {_point(error.worst)}"
        token = NONE
        if error.worst_token:
            value = error.worst_token.worst_token_sqnr[error.codec]
            token = f"{value:.1f} dB: {_point(error.worst_token)}"
        rows.append([error.codec, f"{error.median:.1f}", worst, token, _extreme(error)])
    caption = (
        f"{file.label}: SQNR. Standing out: more than {BELOW_MEDIAN_DB:g} dB below the codec's "
        f"median, or under {LOW_DB:g} dB."
    )
    return Table(caption, head, rows, words=True)


def _extreme(error: CodecError) -> str:
    """The sync points that stand out, the worst `_NAMED` of them by name."""
    named = by_kind(error.extreme[:_NAMED])
    words = [
        f"{kind} " + ", ".join(f"{point.layer} ({point.sqnr[error.codec]:.1f})" for point in points)
        for kind, points in named.items()
    ]
    more = len(error.extreme) - _NAMED
    words += [f"{more} more"] if more > 0 else []
    words += [f"{error.missing} not finite"] if error.missing else []
    return "; ".join(words) or "none"


def _point(point: PointError) -> str:
    return f"layer {point.layer} {point.name}"


def needles(file: ResultFile, measured: LongContext) -> Table:
    """How many needles were found."""
    native = measured.native
    rows = [["native BF16", share(native.retrieved, native.retrieved_stderr)]]
    for one in measured.results:
        rows.append([one.variant, share(one.retrieved, one.retrieved_stderr)])
    caption = (
        f"{file.label}: passwords that were planted in {measured.name} ({measured.needles} in all) "
        "and are found when asked for at its end, ± standard error over texts."
    )
    return Table(caption, ["codec", "found, %"], rows)


def generation(file: ResultFile, measured: Generation) -> Table:
    """How long generated text stays the same as native's."""
    head = ["codec", f"same tokens before the first other one, of {measured.new_tokens}"]
    head += ["prompts without any other, %"]
    rows = [
        [
            result.variant,
            with_error(result.mean_agreement, result.mean_agreement_stderr, digits=1),
            share(result.full_agreement, result.full_agreement_stderr),
        ]
        for result in measured.results
    ]
    caption = f"{file.label}: {measured.name}, {measured.prompts} prompts, greedy."
    return Table(caption, head, rows)


def recipe(points: list[RecipePoint]) -> Table:
    """The recipe, layers with the same setting in one row."""
    rows = [
        [name, f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"]
        + ["all" if value is None else str(value) for value in setting]
        for name, layers, setting in runs(points)
    ]
    head = ["sync point", "layers", "codec", "bits", "BF16 features"]
    return Table("The recipe in full.", head, rows, is_folded=True)


def raw(file: ResultFile, text: Text) -> Table:
    """All numbers of one text."""
    head = ["codec", "by", "bits/value", "bytes/token", "perplexity"]
    head += ["loss, nats", "KL, nats", "top-1, %"]
    sent = number(file.data.native.wire_bytes_per_token, 0)
    row = ["native BF16", "native", "16.00", sent, number(text.native.perplexity, 3)]
    rows = [[*row, "0", "0", "100.0"]]
    for result in text.results:
        variant = file.data.variant(result.variant)
        rows.append(
            [result.variant, variant.collective, number(variant.bits_per_value, 2)]
            + [number(variant.wire_bytes_per_token, 0), number(result.perplexity, 3)]
            + [with_error(result.delta_nll, result.delta_nll_stderr)]
            + [with_error(result.kl, result.kl_stderr), share(result.top1)]
        )
    caption = f"{file.label}: {text.name}, {text.tokens:,} tokens in sequences of "
    return Table(f"{caption}{text.seq_length}, sha256 {text.sha256[:12]}.", head, rows)


def files(read: list[ResultFile], index_sha256: str) -> Table:
    """The evaluation files, and whether they are of this calibration index."""
    head = ["file", "written", "model", "tensor parallel size", "calibration index"]
    rows = []
    for file in read:
        data = file.data
        same = "this one" if data.index_sha256 == index_sha256 else "ANOTHER ONE"
        index = f"{data.index_sha256[:12]}, {same}"
        written = f"{file.date:%Y-%m-%d %H:%M} UTC"
        rows.append([file.path.name, written, data.model, file.label, index])
    return Table("Evaluation files.", head, rows, words=True)


def number(value: Number, digits: int) -> str:
    """A number, or `NONE`."""
    return NONE if value is None else f"{value:,.{digits}f}"


def with_error(value: Number, error: Number, *, digits: int = 4) -> str:
    """A number and its standard error, where there is one."""
    return number(value, digits) + ("" if error is None else f" ± {error:.{digits}f}")


def share(value: Number, error: Number = None) -> str:
    """A share in percent, and its standard error where there is one."""
    return with_error(*(None if one is None else 100 * one for one in (value, error)), digits=1)
