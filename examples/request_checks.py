"""What a request to Megatron's text-generation server may hold, checked before a rank is woken.

Megatron's server (0.19.2) tells the other ranks of a request first and tokenizes it then: what
fails after that, on one rank or on all, ends the server for everybody. So each request is checked
here by a schema, and by its tokens, and a bad one is answered with status 400 and the limit.
"""

import threading
from collections.abc import Callable
from typing import Annotated, Any, Self

from flask import Flask, Response, jsonify, make_response, request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from werkzeug.exceptions import BadRequest

BODY_BYTES = 1 << 24
PROMPTS = 128  # Megatron's own limit
_SEED = (1 << 31) - 1


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half a pair (a lone surrogate)") from None
    return text


Text = Annotated[str, AfterValidator(_utf8)]
# Colder than 0.01, logits may overflow.
Temperature = Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Prompts = Annotated[list[Text], Field(min_length=1, max_length=PROMPTS)]
Tokens = Annotated[
    list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]],
    Field(min_length=1, max_length=PROMPTS),
]


class Generate(BaseModel):
    """PUT /api."""

    model_config = ConfigDict(strict=True)

    prompts: Prompts
    tokens_to_generate: int = Field(64, ge=0)
    logprobs: bool = False
    temperature: Temperature = 1.0
    top_k: int = Field(0, ge=0, le=1000)
    top_p: Share = 0.0
    top_p_decay: Share = 0.0
    top_p_bound: Share = 0.0
    add_BOS: bool = False
    stop_on_double_eol: bool = False
    stop_on_eol: bool = False
    prevent_newline_after_colon: bool = False
    random_seed: int = Field(0, ge=0, le=_SEED)
    stop_token: int = Field(0, ge=0, le=_SEED)
    length_penalty: float = Field(1.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.top_k and self.top_p:
            raise ValueError("top_k and top_p: give one of them")
        if self.tokens_to_generate == 0 and not self.logprobs:
            raise ValueError("tokens_to_generate: 0 needs logprobs, at least 1 without")
        if not self.top_p and {"top_p_decay", "top_p_bound"} & self.model_fields_set:
            raise ValueError("top_p_decay and top_p_bound need top_p")
        if "top_p_bound" in self.model_fields_set and not 0 < self.top_p_bound <= self.top_p:
            raise ValueError("top_p_bound: above 0 and at most top_p")
        return self

    def texts(self, detokenize: Callable[[list[int]], str]) -> list[str]:
        """The prompts."""
        return self.prompts

    @property
    def tokens(self) -> int:
        """How many are asked for."""
        return self.tokens_to_generate


class Complete(BaseModel):
    """POST /completions."""

    model_config = ConfigDict(strict=True)

    prompt: Text | Prompts | Tokens
    max_tokens: int = Field(ge=0)
    temperature: Temperature | Annotated[float, Field(ge=0, le=0)] = 1.0
    top_k: int = Field(0, ge=0, le=1000)
    top_p: Share = 1.0
    logprobs: int = Field(0, ge=0, le=10)
    echo: bool = False
    seed: int = Field(-1, ge=-1, le=_SEED)
    best_of: int = Field(1, ge=1, le=1)
    n: int = Field(1, ge=1, le=1)
    stop: Text | Annotated[list[Text], Field(max_length=PROMPTS)] = ""
    debug_fname: None = Field(None, description="Megatron would write a file of this name")

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.top_k and self.top_p and self.temperature:
            raise ValueError("top_k needs top_p: 0, since they exclude each other")
        if self.max_tokens and self.logprobs:
            raise ValueError("logprobs need max_tokens: 0")
        if not self.max_tokens and not self.echo:
            raise ValueError("max_tokens: 0 needs echo, at least 1 without")
        return self

    def texts(self, detokenize: Callable[[list[int]], str]) -> list[str]:
        """The prompts."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [p if isinstance(p, str) else detokenize(p) for p in self.prompt]

    @property
    def tokens(self) -> int:
        """How many are asked for."""
        return self.max_tokens


_SCHEMAS = {("PUT", "/api"): Generate, ("POST", "/completions"): Complete}


class Checks:
    """The checks of one server."""

    def __init__(self, tokenizer: Any, *, positions: int, vocabulary: int):
        """
        Args:
            tokenizer: Megatron's, one that nobody else uses.
            positions: The tokens that the model takes, those that it generates included.
            vocabulary: Rows of its embedding.
        """
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._positions = positions
        self._ids = min(vocabulary, tokenizer.vocab_size)
        self._vocabulary = vocabulary

    def install(self, app: Flask) -> None:
        """Answer bad requests before `app` sees them."""
        app.config["MAX_CONTENT_LENGTH"] = BODY_BYTES
        app.before_request(self._before)

    def _before(self) -> Response | None:
        schema = _SCHEMAS.get((request.method, request.path))
        if schema is None:
            return None
        try:
            self.check(schema, request.get_json())
        except RecursionError:
            return _refused("the request is nested too deep")
        except (ValidationError, ValueError) as error:
            return _refused(one_line(error))
        except BadRequest:
            return _refused("the body is no JSON")
        return None

    def check(self, schema: Any, content: object) -> None:
        """Raises ValueError for a request that the server could not serve."""
        asked = schema.model_validate(content)
        if asked.top_k >= self._ids:
            raise ValueError(f"top_k: {asked.top_k} is not below the vocabulary's {self._ids}")
        with self._lock:
            texts = asked.texts(self._detokenize)
            prompts = [self._tokenizer.tokenize(text) for text in texts]
        for number, ids in enumerate(prompts):
            if not ids:
                raise ValueError(f"prompt {number} has no token: at least 1")
            if max(ids) >= self._vocabulary:
                raise ValueError(
                    f"prompt {number} has token {max(ids)}: the model has {self._vocabulary}"
                )
        longest = max(map(len, prompts))
        if longest + asked.tokens > self._positions:
            raise ValueError(
                f"a prompt of {longest} tokens and {asked.tokens} to generate: together at most "
                f"{self._positions}, the positions of the model"
            )

    def _detokenize(self, ids: list[int]) -> str:
        if max(ids) >= self._ids:
            raise ValueError(f"prompt: token {max(ids)} is not below the vocabulary's {self._ids}")
        return self._tokenizer.detokenize(ids)


def _refused(message: str, status: int = 400) -> Response:
    return make_response(jsonify({"error": message}), status)


def one_line(error: ValueError) -> str:
    """What is wrong with a request, without the schema's own details."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
