"""What a request to Megatron's OpenAI-compatible endpoint may hold, checked before it is sent on.

Megatron's endpoint (0.19.2) takes what it knows and leaves the rest unread, and its dynamic engine
asserts. So a request is checked here by a schema and by its tokens: what would end the engine, and
what would be ignored, is answered with status 400 and the reason.
"""

from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from request_checks import BODY_BYTES, Checks, Prompts, Share, Temperature, Text, Tokens, one_line

# What the endpoint does without, and the values that say so.
ABSENT: dict[str, tuple] = {
    "stream": (None, False),
    "stream_options": (None,),
    "best_of": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
}
# What it has for completions alone: answers to chats leave them out.
ABSENT_IN_CHATS: dict[str, tuple] = {
    "stop": (None, []),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
}
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
StopWord = Annotated[Text, Field(min_length=1)]
Cold = Temperature | Annotated[float, Field(ge=0, le=0)]  # 0 is greedy


class Request(BaseModel):
    """What both kinds of completion share."""

    model_config = ConfigDict(strict=True, extra="forbid")
    absent: ClassVar[dict[str, tuple]] = ABSENT

    model: str | None = None
    user: str | None = None
    temperature: Cold = 1.0
    top_p: Share = 1.0
    top_k: int = Field(0, ge=0, le=1000)
    seed: int | None = None
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _known(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        for name, values in cls.absent.items():
            if name in content and content[name] not in values:
                raise ValueError(f"{name}: Megatron's endpoint does not have it, leave it out")
        return {name: value for name, value in content.items() if name not in cls.absent}

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.top_k and self.top_p and self.temperature:
            raise ValueError("top_k needs top_p: 0, since they exclude each other")
        if self.seed is not None and self.temperature and self.top_k != 1:
            raise ValueError(
                "seed: Megatron's engine draws for all requests from one generator; leave it out, "
                "or give temperature 0"
            )
        return self


class Completion(Request):
    """POST /v1/completions."""

    prompt: Text | Ids | Prompts | Tokens
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=10)
    echo: bool = False
    stop: None | StopWord | Annotated[list[StopWord], Field(max_length=16)] = None
    n: int = Field(1, ge=1, le=1)

    def texts(self, detokenize: Any) -> list[str]:
        """The prompts."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        rows: list = [self.prompt] if isinstance(self.prompt[0], int) else self.prompt
        return [row if isinstance(row, str) else detokenize(row) for row in rows]

    @property
    def tokens(self) -> int:
        """How many are asked for."""
        return self.max_tokens


class Message(BaseModel):
    """One of a chat."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Annotated[str, Field(pattern="^(system|user|assistant)$")]
    content: Text


class Chat(Request):
    """POST /v1/chat/completions."""

    absent = ABSENT | ABSENT_IN_CHATS

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=8)

    def texts(self, detokenize: Any) -> list[str]:
        """The messages; what the template puts between them is not counted."""
        return ["\n".join(message.content for message in self.messages)]

    @property
    def tokens(self) -> int:
        """How many are asked for."""
        return self.max_completion_tokens or self.max_tokens or 1


_SCHEMAS: dict[str, Any] = {"/completions": Completion, "/chat/completions": Chat}
_READ = ("/health",)


def install(tokenizer: Any, *, positions: int, vocabulary: int) -> None:
    """Answer bad requests before the endpoint sees them; call it before the endpoint starts.

    Args:
        tokenizer: Megatron's, of this process alone.
        positions: The tokens that the model takes, those that it generates included.
        vocabulary: Rows of its embedding.
    """
    from megatron.core.inference.text_generation_server.dynamic_text_gen_server import endpoints
    from quart import jsonify, request

    checks = Checks(tokenizer, positions=positions, vocabulary=vocabulary)

    def refused(message: str, status: int) -> tuple:
        return jsonify({"error": {"message": message, "type": "invalid_request_error"}}), status

    async def before() -> tuple | None:
        path = request.path.removeprefix("/v1")
        if path not in _SCHEMAS:
            # The others steer CUDA's profiler, which ends an engine that has none.
            return None if path in _READ else refused(f"{request.path}: no such endpoint", 404)
        if request.method != "POST":
            return refused(f"{request.method}: POST it", 405)
        if (request.content_length or 0) > BODY_BYTES:
            return refused(f"at most {BODY_BYTES} bytes", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        try:
            checks.check(_SCHEMAS[path], await request.get_json(force=True))
        except RecursionError:
            return refused("the request is nested too deep", 400)
        except (ValidationError, ValueError) as error:
            return refused(one_line(error), 400)
        except Exception as error:
            if getattr(error, "code", None) != HTTPStatus.BAD_REQUEST:
                raise
            return refused("the body is no JSON", 400)
        return None

    # The endpoint's own limit is 1 GB, and a body that comes in chunks has no length to look at.
    endpoints.__all__[0].record(lambda at: at.app.config.update(MAX_CONTENT_LENGTH=BODY_BYTES))
    endpoints.__all__[0].before_app_request(before)
