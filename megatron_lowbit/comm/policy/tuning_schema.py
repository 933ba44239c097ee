"""What a tuning file must hold (`comm.policy.tuning`), as pydantic models."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from megatron_lowbit.comm.policy.timings import native_of
from megatron_lowbit.schema import MOST_RANKS, Exact, Name

Bytes = Annotated[int, Field(ge=1, le=1 << 50)]
# A day is far beyond a collective; zero or less cannot be interpolated on a logarithmic scale.
Milliseconds = Annotated[float, Field(gt=1e-9, le=86_400_000.0, allow_inf_nan=False)]
Ranks = Annotated[int, Field(ge=1, le=MOST_RANKS)]


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # strict: JSON has lists only


Rounds = Annotated[
    tuple[Milliseconds, ...], BeforeValidator(_pair), Field(min_length=1, max_length=1000)
]


class Times(Exact):
    codec: str  # "" for native
    carries: bool
    collective: Name
    points: Annotated[
        list[Annotated[tuple[Bytes, Rounds], BeforeValidator(_pair)]],
        Field(min_length=1, max_length=1000),
    ]

    @model_validator(mode="after")
    def _has_each_size_once(self) -> Self:
        if len({size for size, _ in self.points}) < len(self.points):
            raise ValueError("points have a size more than once")
        return self


class TuningFile(Exact):
    format_version: Literal[2]
    machine: dict[Name, str]
    ranks: Ranks
    node_size: Ranks | None
    link: str
    times: Annotated[list[Times], Field(max_length=1000)]

    @model_validator(mode="after")
    def _has_native(self) -> Self:
        keys = [(entry.codec, entry.carries, entry.collective) for entry in self.times]
        if ("", False, "native") not in keys:
            raise ValueError("no times of native")
        if len(set(keys)) < len(keys):
            raise ValueError("times has a codec and collective more than once")
        return self

    @model_validator(mode="after")
    def _has_whole_rounds(self) -> Self:
        """A round calls native, and all codecs by a collective or none of them."""
        found: dict[tuple[str, int], int] = {}
        for entry in sorted(self.times, key=lambda entry: entry.codec):  # native first
            for size, rounds in entry.points:
                native = found.get((native_of(entry.collective), size), 0)
                count = found.setdefault((entry.collective, size), len(rounds))
                if len(rounds) != count or (entry.codec and count > native):
                    raise ValueError(
                        f"{entry.codec or entry.collective} has {len(rounds)} rounds at {size} "
                        f"bytes, {entry.collective} has {count}, native {native}"
                    )
        return self
