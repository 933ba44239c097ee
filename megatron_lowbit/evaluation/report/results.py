"""Evaluation files as tools/evaluate.py writes them (`evaluation.output`): what the report reads.

A key that is missing, or holds another type, is an error that names the
file and the key. Every number may be null (it was not finite); a section that is null or empty was
not measured. Keys that the report does not show
are left out here.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.output import FORMAT

Number = float | None


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Variant(_Part):
    """A codec and the collective it was measured by; bytes are what one rank sends for a token."""

    codec: str
    collective: str
    bits_per_value: Number
    wire_bytes_per_token: Number


class NativeTraffic(_Part):
    wire_bytes_per_token: Number


class NativeText(_Part):
    perplexity: Number


class TextResult(_Part):
    """Loss (`delta_nll`) and KL in nats a token, against native; `top1` is a share."""

    codec: str
    perplexity: Number
    delta_nll: Number
    delta_nll_stderr: Number
    kl: Number
    kl_stderr: Number
    top1: Number


class Text(_Part):
    name: str
    sha256: str
    tokens: int
    seq_length: int
    native: NativeText
    results: list[TextResult]


class Accuracy(_Part):
    """Shares of the items, and their standard errors."""

    acc: Number
    acc_stderr: Number
    acc_norm: Number
    acc_norm_stderr: Number


class TaskResult(Accuracy):
    codec: str
    kept: Number
    difference: Number
    difference_stderr: Number


class Task(_Part):
    name: str
    items: int
    metric: Literal["acc", "acc_norm"]
    native: Accuracy
    results: list[TaskResult]

    def score(self, of: Accuracy) -> tuple[Number, Number]:
        """The task's own metric and its standard error."""
        return getattr(of, self.metric), getattr(of, f"{self.metric}_stderr")


class AverageResult(_Part):
    """`kept` is the share of native's average, with its 95 % confidence interval."""

    codec: str
    average: Number
    average_stderr: Number
    kept: Number
    kept_low: Number
    kept_high: Number
    difference: Number
    difference_stderr: Number


class TaskAverage(_Part):
    native: Number
    native_stderr: Number
    results: list[AverageResult]


class NativeRetrieval(_Part):
    retrieved: Number
    retrieved_stderr: Number


class LongContextResult(_Part):
    """`delta_nll` and `kl` have an entry for each bucket; `retrieved` is the share of needles."""

    codec: str
    delta_nll: list[Number]
    kl: list[Number]
    retrieved: Number
    retrieved_stderr: Number


class LongContext(_Part):
    name: str
    sequences: int
    needles: int
    buckets: list[Annotated[list[int], Field(min_length=2, max_length=2)]]
    native: NativeRetrieval
    results: list[LongContextResult]

    @model_validator(mode="after")
    def _has_all_buckets(self) -> Self:
        for result in self.results:
            if {len(result.delta_nll), len(result.kl)} != {len(self.buckets)}:
                raise ValueError(f"{result.codec} has not one value for each of the buckets")
        return self


class GenerationResult(_Part):
    """Tokens up to the first that differs from native's, on average; share without any."""

    codec: str
    mean_agreement: Number
    mean_agreement_stderr: Number
    full_agreement: Number
    full_agreement_stderr: Number


class Generation(_Part):
    name: str
    new_tokens: int
    prompts: int
    results: list[GenerationResult]


class PointError(_Part):
    """Signal to quantization noise at one sync point, in dB, by codec."""

    layer: int
    name: str
    sqnr: dict[str, Number]
    worst_token_sqnr: dict[str, Number]


class SyncPoints(_Part):
    sequences: int
    points: list[PointError]


class Evaluation(_Part):
    """All of one file."""

    format: Literal[FORMAT]  # type: ignore[valid-type]  # a constant, though not a literal
    model: str
    tp_size: int
    simulated: bool
    index_sha256: str
    variants: list[Variant]
    native: NativeTraffic
    texts: list[Text]
    tasks: list[Task]
    task_average: TaskAverage | None
    long_context: list[LongContext]
    generation: list[Generation]
    sync_points: SyncPoints | None

    def variant(self, codec: str) -> Variant:
        """The variant of a codec that a result names."""
        return next(variant for variant in self.variants if variant.codec == codec)

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
        label = data.label if labels.count(data.label) == 1 else f"{data.label}, {path.name}"
        date = datetime.fromtimestamp(path.stat().st_mtime, tz=UTC)
        files.append(ResultFile(path=path, date=date, label=label, data=data))
    return files


def _read(path: Path) -> Evaluation:
    try:
        content = json.loads(path.read_bytes(), parse_constant=lambda name: None)
    except ValueError as error:
        raise LowbitError(f"{path} is not valid JSON ({error})") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise LowbitError(
            f"{path}: format is {json.dumps(found)}, this report reads {FORMAT}: "
            "write the file again with tools/evaluate.py"
        )
    try:
        evaluation = Evaluation.model_validate(content)
    except ValidationError as error:
        raise LowbitError(f"{path}: {first_problem(error)}") from None
    codecs = [variant.codec for variant in evaluation.variants]
    for codec in codecs:
        if codecs.count(codec) > 1:
            raise LowbitError(f"{path}: variants has codec {codec!r} more than once")
    _check_codecs(content, set(codecs), path)
    return evaluation


def first_problem(error: ValidationError) -> str:
    """The first key that is wrong, and what is wrong with it: ``texts[0].kl: Field required``."""
    first = error.errors()[0]
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    return f"{''.join(parts).lstrip('.')}: {first['msg']}"


def _check_codecs(value, known: set[str], path: Path) -> None:
    """Raise if any result, at any depth, is of a codec that `variants` lacks."""
    if isinstance(value, list):
        for one in value:
            _check_codecs(one, known, path)
    elif isinstance(value, dict):
        named = {value["codec"]} if "codec" in value else set()
        for codec in named | set(value.get("sqnr", ())) | set(value.get("worst_token_sqnr", ())):
            if codec not in known:
                raise LowbitError(f"{path}: a result is of codec {codec!r}: variants lacks it")
        for one in value.values():
            _check_codecs(one, known, path)
