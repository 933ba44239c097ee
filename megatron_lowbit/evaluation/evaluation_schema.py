"""The JSON output of an evaluation, for the one that writes it and for those that read it.

The lists of what was not measured are empty, and ``task_average`` is null. A measured figure's
standard error (over sequences, items or prompts; null for a single one) is under the same key with
``_stderr``. A number that is not finite is null, such as the SQNR of sums without error. A key that
is missing, or holds another type, is an error that names it; keys that are not known are left out.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from megatron_lowbit.schema import MOST_RANKS, Name, Strict

FORMAT = 3
_MOST = 1e30  # of a number; beyond, it is nothing that can be drawn or compared


def _drawable(value: float | None) -> float | None:
    return value if value is not None and abs(value) <= _MOST else None


Number = Annotated[float | None, AfterValidator(_drawable)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]


class Variant(Strict):
    """What was compared with native communication, and the collective it was sent by.

    Bits per value and bytes per token are those of all units of all measures together, from the
    real payloads. A token's bytes are what one rank sends for it through all sync points.
    """

    name: Name = Field(alias="variant")
    collective: Name
    bits_per_value: Number
    wire_bytes_per_token: Number


class NativeTraffic(Strict):
    """Bytes are those of a ring."""

    wire_bytes_per_token: Number


class NativeText(Strict):
    perplexity: Number


class TextResult(Strict):
    """Loss (`delta_nll`) and KL in nats a token, against native.

    `top1` is the share of tokens whose most likely next token is native's.
    """

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
    """`difference` and `kept` (native's share) are of the task's own metric.

    `same_choice` is the share of items where it chooses as native does, right or wrong.
    """

    variant: Name
    kept: Number
    difference: Number
    difference_stderr: Number
    same_choice: Number


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
    kept_stderr: Number
    kept_low: Number
    kept_high: Number
    difference: Number
    difference_stderr: Number


class TaskAverage(Strict):
    native: Number
    native_stderr: Number
    results: list[AverageResult]


class Retrieval(Strict):
    """The share of the planted needles that are found, of all and by depth."""

    retrieved: Number
    retrieved_stderr: Number
    retrieved_by_depth: list[Number]


class NativeLongContext(Retrieval):
    """Loss in nats a token; an entry for each bucket."""

    nll: list[Number]
    nll_stderr: list[Number]


class LongContextResult(Retrieval):
    """Loss and KL against native, an entry for each bucket; needles that only one of both found.

    `delta_log_likelihood` is that of a needle's code less native's, in nats.
    """

    variant: Name
    delta_nll: list[Number]
    delta_nll_stderr: list[Number]
    kl: list[Number]
    kl_stderr: list[Number]
    lost: Count
    gained: Count
    delta_log_likelihood: Number
    delta_log_likelihood_stderr: Number


class LongContext(Strict):
    """A long text by bucket of positions, ``[first, end]``, and the needles planted in it."""

    name: Name
    sha256: Name
    sequences: Count
    seq_length: Count
    buckets: list[Annotated[list[Count], Field(min_length=2, max_length=2)]]
    needles: Count
    depths: list[Number]
    native: NativeLongContext
    results: list[LongContextResult]

    @model_validator(mode="after")
    def _has_all_buckets(self) -> Self:
        for result in self.results:
            if {len(result.delta_nll), len(result.kl)} != {len(self.buckets)}:
                raise ValueError(f"{result.variant} has not one value for each of the buckets")
        return self


class GenerationResult(Strict):
    """Tokens up to the first that differs from native's; share of prompts without any."""

    variant: Name
    mean_agreement: Number
    mean_agreement_stderr: Number
    median_agreement: Number
    full_agreement: Number
    full_agreement_stderr: Number


class Generation(Strict):
    name: Name
    sha256: Name
    prompts: Count
    prompt_length: Count
    new_tokens: Count
    results: list[GenerationResult]


class PointError(Strict):
    """Signal to quantization noise at one sync point, in dB, by variant.

    Of all tokens, of the worst token, and of the residual stream behind the sync point.
    """

    layer: Count
    name: Name
    sqnr: dict[str, Number]
    worst_token_sqnr: dict[str, Number]
    stream_sqnr: dict[str, Number] = {}  # files of format 2 have none


class SyncPoints(Strict):
    sequences: Count
    points: list[PointError]


class Evaluation(Strict):
    """All of one file; `native` is BF16 in a ring all-reduce."""

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
