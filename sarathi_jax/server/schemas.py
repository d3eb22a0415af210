"""The bodies of requests. A field that is not here is refused by its name; a null means the field's default.

Checking stops at the first thing that is wrong in a list: listing a million of them would keep everybody else waiting.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sarathi_jax.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_SEED, RequestError, SamplingParams
from sarathi_jax.server.front import refusal

MAX_PRIORITY = 2**31

# Not pydantic's `FailFast`, which has no hash: Python 3.12.1 makes no union with it.
_FAIL_FAST = Field(fail_fast=True)
_Priority = Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
_Token = Annotated[int, Field(ge=0)]
_Tokens = Annotated[list[_Token], _FAIL_FAST]
_Texts = Annotated[list[str], _FAIL_FAST]
# Handed to `SamplingParams` as they are.
_SAMPLING = (
    "n",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "structured_outputs",
)


def _few(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("too_many", "at most {most} entries are served", {"most": MAX_LOGIT_BIAS})
    return given


class Body(BaseModel):
    """What all have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        """Refuses the first unknown field."""
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next((name for name in given if name not in known), None) if isinstance(given, dict) else None
        if unknown is not None:
            message = "{name} is not a field that this server honours: leave it out"
            raise PydanticCustomError("unknown_field", message, {"name": unknown[:100]})
        return given


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool | None = None


class SamplingBody(Body):
    """What completions and chats have in common; the fields mean what they do in `SamplingParams`."""

    model: str
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: str | _Texts | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_few)] | None = None
    user: str | None = None
    # Beyond OpenAI's.
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: _Tokens | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    priority: _Priority | None = None
    slo_ms: Annotated[float, Field(gt=0)] | None = None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, **more: Any) -> SamplingParams:
        """As parameters of the engine.

        Args:
          more: what the body spells in another way; goes before its fields.

        Raises:
          ApiError: a value is out of range.
        """
        fields = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        try:
            if self.logit_bias is not None:
                fields["logit_bias"] = _biases(self.logit_bias)
            if self.stream_options is not None and not self.stream:
                raise RequestError("stream_options=... is for streams: leave it out, or set stream")
            return SamplingParams.from_dict(fields | more)
        except RequestError as error:
            raise refusal(error) from None


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: str | _Tokens | _Texts | Annotated[list[_Tokens], _FAIL_FAST]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: None = None


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """A call that the assistant made; `arguments` is a JSON object as text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A tool call in the history."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], _FAIL_FAST] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], _FAIL_FAST] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None


class JsonSchemaFormat(Body):
    """A schema that the answer follows; it is always followed, `strict` or not."""

    name: str | None = None
    description: str | None = None
    # In OpenAI's spelling a field `schema`, which pydantic has a method for.
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer looks like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class FunctionDefinition(Body):
    """A function that the model may call; its `parameters` are a JSON schema, and always followed."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that the model may use."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedToolChoice(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None


class TokenizeBody(Body):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: _Tokens


def _biases(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise RequestError("logit_bias=... must have token ids as keys") from None
