"""What files must hold, as pydantic models: strict types, and one line for the first bad value."""

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.json_files import shown

MOST_RANKS = 1 << 16
MOST_LAYERS = 1 << 14
MOST_FEATURES = 1 << 20  # of a token


def _printable(text: str) -> str:
    if not text or any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError(f"{shown(text)} is empty or has a control character such as NUL")
    return text


# What names something: it is printed, and part of file names.
Name = Annotated[str, Field(max_length=1000), AfterValidator(_printable)]
# A layer as a key of an object, from 1: no sign, no leading zero, ASCII digits.
LayerKey = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Width = Annotated[int, Field(ge=1, le=16)]  # bits of a value
Features = Annotated[int, Field(ge=0, le=MOST_FEATURES)]


class Strict(BaseModel):
    """No value becomes another type: not 4.0 or "4" or true an integer."""

    model_config = ConfigDict(strict=True, frozen=True)


class Exact(Strict):
    """And no key that is not known."""

    model_config = ConfigDict(extra="forbid")


Model = TypeVar("Model", bound=BaseModel)


def validated(
    model: type[Model],
    value: Any,
    where: str,
    *,
    error: type[LowbitError] = LowbitError,
    remedy: str = "",
) -> Model:
    """`value` as `model`, or an error that names the file, the path of the bad value and the value.

    Args:
        model: What it must be.
        value: From JSON.
        where: The file's path, for the message.
        error: What is raised.
        remedy: What to do about it, at the end of the message.
    """
    try:
        return model.model_validate(value)
    except ValidationError as failure:
        behind = f"; {remedy}" if remedy else ""
        raise error(f"{where}: {first_problem(failure)}{behind}") from None


def first_problem(error: ValidationError) -> str:
    """The first value that is wrong, and how: ``texts[0].kl: Field required``."""
    first = error.errors(include_url=False)[0]
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    place = "".join(parts).lstrip(".")
    found = first["input"]
    says_value = first["type"] in ("missing", "value_error")
    is_plain = not says_value and not isinstance(found, dict | list | BaseModel)
    problem = first["msg"].removeprefix("Value error, ")
    text = f"{place}: {problem}" if place else problem
    if len(text) > 300:
        text = f"{text[:300]}..."
    return repr(f"{text} ({shown(found)})" if is_plain else text)[1:-1].replace("\\'", "'")
