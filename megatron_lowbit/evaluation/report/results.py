"""Evaluation files as tools/evaluate.py writes them (`evaluation.output`): what the report reads.

A key that is missing, or holds another type, is an error that names the
file and the key. Every number may be null (it was not finite), and what is beyond 1e30 counts as
such; a section that is null or empty was not measured. Keys that the report does not show are left
out here.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.output import FORMAT, read_summary
from megatron_lowbit.json_files import shown
from megatron_lowbit.schema import MOST_RANKS, Name, Strict, validated

_MOST = 1e30  # of a number; beyond, it is nothing that can be drawn or compared


def _drawable(value: float | None) -> float | None:
    return value if value is not None and abs(value) <= _MOST else None


Number = Annotated[float | None, AfterValidator(_drawable)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]


class Variant(Strict):
    """A codec and the collective it was measured by; bytes are what one rank sends for a token."""

    name: Name = Field(alias="variant")
    collective: Name
    bits_per_value: Number
    wire_bytes_per_token: Number


class NativeTraffic(Strict):
    wire_bytes_per_token: Number


class NativeText(Strict):
    perplexity: Number


class TextResult(Strict):
    """Loss (`delta_nll`) and KL in nats a token, against native; `top1` is a share."""

    variant: Name
    perplexity: Number
    delta_nll: Number
    delta_nll_stderr: Number
    kl: Number
    kl_stderr: Number
    top1: Number


class Text(Strict):
    name: Name
    sha256: Name
    tokens: Count
    seq_length: Count
    native: NativeText
    results: list[TextResult]


class Accuracy(Strict):
    """Shares of the items, and their standard errors."""

    acc: Number
    acc_stderr: Number
    acc_norm: Number
    acc_norm_stderr: Number


class TaskResult(Accuracy):
    variant: Name
    kept: Number
    difference: Number
    difference_stderr: Number


class Task(Strict):
    name: Name
    items: Count
    metric: Literal["acc", "acc_norm"]
    native: Accuracy
    results: list[TaskResult]

    def score(self, of: Accuracy) -> tuple[Number, Number]:
        """The task's own metric and its standard error."""
        return getattr(of, self.metric), getattr(of, f"{self.metric}_stderr")


class AverageResult(Strict):
    """`kept` is the share of native's average, with its 95 % confidence interval."""

    variant: Name
    average: Number
    average_stderr: Number
    kept: Number
    kept_low: Number
    kept_high: Number
    difference: Number
    difference_stderr: Number


class TaskAverage(Strict):
    native: Number
    native_stderr: Number
    results: list[AverageResult]


class NativeRetrieval(Strict):
    retrieved: Number
    retrieved_stderr: Number


class LongContextResult(Strict):
    """`delta_nll` and `kl` have an entry for each bucket; `retrieved` is the share of needles."""

    variant: Name
    delta_nll: list[Number]
    kl: list[Number]
    retrieved: Number
    retrieved_stderr: Number


class LongContext(Strict):
    name: Name
    sequences: Count
    needles: Count
    buckets: list[Annotated[list[Count], Field(min_length=2, max_length=2)]]
    native: NativeRetrieval
    results: list[LongContextResult]

    @model_validator(mode="after")
    def _has_all_buckets(self) -> Self:
        for result in self.results:
            if {len(result.delta_nll), len(result.kl)} != {len(self.buckets)}:
                raise ValueError(f"{result.variant} has not one value for each of the buckets")
        return self


class GenerationResult(Strict):
    """Tokens up to the first that differs from native's, on average; share without any."""

    variant: Name
    mean_agreement: Number
    mean_agreement_stderr: Number
    full_agreement: Number
    full_agreement_stderr: Number


class Generation(Strict):
    name: Name
    new_tokens: Count
    prompts: Count
    results: list[GenerationResult]


class PointError(Strict):
    """Signal to quantization noise at one sync point, in dB, by codec."""

    layer: Count
    name: Name
    sqnr: dict[str, Number]
    worst_token_sqnr: dict[str, Number]
    stream_sqnr: dict[str, Number] = {}  # files of format 2 have none


class SyncPoints(Strict):
    sequences: Count
    points: list[PointError]


class Evaluation(Strict):
    """All of one file."""

    format: Literal[FORMAT]  # type: ignore[valid-type]  # a constant, though not a literal
    model: Name
    tp_size: Annotated[int, Field(ge=1, le=MOST_RANKS)]
    simulated: bool
    index_sha256: Name
    variants: list[Variant]
    native: NativeTraffic
    texts: list[Text]
    tasks: list[Task]
    task_average: TaskAverage | None
    long_context: list[LongContext]
    generation: list[Generation]
    sync_points: SyncPoints | None

    def variant(self, name: str) -> Variant:
        """The variant that a result names."""
        return next(variant for variant in self.variants if variant.name == name)

    @property
    def label(self) -> str:
        """What tells it from the others: ``TP 8, simulated``."""
        return f"TP {self.tp_size}, {'simulated' if self.simulated else 'real'}"


@dataclass(frozen=True)
class ResultFile:
    """An evaluation and where it was read from.

    Attributes:
        path: As the user named it.
        date: When the file was written, UTC.
        label: Of the evaluation; with the file's name, where two evaluations have the same.
        data: What it says.
    """

    path: Path
    date: datetime
    label: str
    data: Evaluation


def read_results(paths: list[Path]) -> list[ResultFile]:
    """Read evaluation files, in the order given.

    Raises:
        LowbitError: One is not an evaluation of this format; the message names the file and key.
        OSError: One cannot be read.
    """
    evaluations = [_read(path) for path in paths]
    labels = [evaluation.label for evaluation in evaluations]
    files = []
    for path, data in zip(paths, evaluations, strict=True):
        name = path.name.encode(errors="backslashreplace").decode()  # it may be no Unicode
        label = data.label if labels.count(data.label) == 1 else f"{data.label}, {name}"
        date = datetime.fromtimestamp(path.stat().st_mtime, tz=UTC)
        files.append(ResultFile(path=path, date=date, label=label, data=data))
    return files


def _read(path: Path) -> Evaluation:
    content = read_summary(path)
    evaluation = validated(Evaluation, content, str(path))
    names = [variant.name for variant in evaluation.variants]
    for name in names:
        if names.count(name) > 1:
            raise LowbitError(f"{path}: variants has {shown(name)} more than once")
    _check_variants(content, set(names), path)
    return evaluation


def _check_variants(value, known: set[str], path: Path) -> None:
    """Raise if any result, at any depth, is of a variant that `variants` lacks."""
    if isinstance(value, list):
        for one in value:
            _check_variants(one, known, path)
    elif isinstance(value, dict):
        named = {value.get("variant")} if isinstance(value.get("variant"), str) else set()
        for key in ("sqnr", "worst_token_sqnr", "stream_sqnr"):
            named |= set(value[key]) if isinstance(value.get(key), dict) else set()
        for name in sorted(str(name) for name in named - known):
            raise LowbitError(f"{path}: a result is of variant {shown(name)}: variants lacks it")
        for one in value.values():
            _check_variants(one, known, path)
