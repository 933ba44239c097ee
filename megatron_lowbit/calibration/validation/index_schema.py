"""What a calibration index's manifest and a recipe file must hold, as pydantic models."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PlainValidator

from megatron_lowbit.json_files import shown
from megatron_lowbit.schema import (
    MOST_FEATURES,
    MOST_LAYERS,
    MOST_RANKS,
    Exact,
    Features,
    Finite,
    LayerKey,
    Name,
    Sha256,
    Strict,
    Width,
)

FORMAT_VERSION = 3
_MOST_OPTIONS = 1000


def _bits(value: object) -> object:
    """Bits of a body value, 0 to send nothing, or of partials and of sums."""
    both = value if isinstance(value, list) and len(value) == 2 else [value]
    if not all(type(one) is int and 0 <= one <= 16 for one in both):
        raise ValueError(f"{shown(value)} is neither 0 to 16 bits nor a list of two of them")
    return value


Bits = Annotated[int | list, PlainValidator(_bits)]
Count = Annotated[int, Field(ge=0)]
Nats = Annotated[Finite, Field(ge=0)]
BitsPerValue = Annotated[Finite, Field(ge=0, le=64)]


class Model(Strict):
    """The model's shape; other keys are compared with the model's own by `integration`."""

    model_config = ConfigDict(extra="allow")

    num_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    hidden_size: Annotated[int, Field(ge=1, le=MOST_FEATURES)]
    fingerprints: dict[LayerKey, Name]


class CalibratedCodec(Exact):
    name: Name
    bits: Width
    bf16_features: Features | None = None


class Corpus(Strict):
    model_config = ConfigDict(extra="allow")

    sequences: Annotated[int, Field(ge=1)] | None = None
    seq_length: Annotated[int, Field(ge=1)] | None = None


class Assigned(Exact):
    """What one sync point gets."""

    codec: Name
    bits: Bits | None = None
    bf16_features: Features | None = None


class RecipeOption(Exact):
    choice: Assigned
    bits_per_value: BitsPerValue


class PlannedRecipe(Exact):
    budget: Nats | None = None
    target_loss: Nats | None = None
    measured_divergence: Finite | None = None
    feedback: bool | None = None
    bits_per_value: BitsPerValue | None = None
    sum_bits_per_value: BitsPerValue | None = None  # none before bits of sums were planned
    predicted_divergence: Nats | None = None
    predicted_two_shot: Nats | None = None
    points: Annotated[dict[LayerKey, dict[Name, Assigned]], Field(min_length=1)]
    options: Annotated[list[RecipeOption], Field(min_length=1, max_length=_MOST_OPTIONS)]


class LayerFile(Exact):
    file: Name
    sha256: Sha256


class Manifest(Exact):
    format_version: Literal[FORMAT_VERSION]  # type: ignore[valid-type]  # a constant, too
    model: Model
    tp_size: Annotated[int, Field(ge=1, le=MOST_RANKS)]
    codec: CalibratedCodec
    corpus: Corpus
    versions: dict[Name, str] = {}
    chain: dict[Name, str] | None = None  # why a sync point carries no error; empty if it does
    recipe: PlannedRecipe | None = None
    layers: Annotated[dict[LayerKey, LayerFile], Field(min_length=1, max_length=MOST_LAYERS)]
    sha256: Sha256


class Rule(Exact):
    """A rule of a recipe file."""

    match: Name
    codec: Name = ""
    bits: Bits = 0
    bf16_features: Features = 0


class SavedProgress(Exact):
    """What a calibration that was interrupted has done (`calibration_loop`)."""

    identity: Sha256
    done: Count
    skipped: list[Annotated[str, Field(pattern=r"^sequence \d+: ", max_length=1000)]]
    sha256: Sha256
