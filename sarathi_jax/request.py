"""What a user asks (`SamplingParams`, `Request`) and gets (`RequestOutput`). Knows neither blocks nor batches."""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 32
MAX_LOGIT_BIAS = 300
MAX_SEED = 2**32 - 1
MAX_GRAMMAR_LENGTH = 100_000


class RequestError(ValueError):
    """A request that cannot be served; the message says what to change. Other requests are not affected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What the text must look like, enforced token by token; exactly one of the fields. The names are vLLM's.

    Attributes:
      json: a JSON schema, as a mapping or as text; kept as text.
      json_object: any JSON object.
      regex: a regular expression that the whole text matches.
      choice: one of these strings.
      grammar: a context-free grammar in the Lark format of llguidance.

    Raises:
      RequestError: none or several fields, or one of a wrong type or longer than `MAX_GRAMMAR_LENGTH` characters.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self):
        if not isinstance(self.json_object, bool):
            raise RequestError(f"structured_outputs.json_object={self.json_object!r} must be True or False")
        names = [field.name for field in dataclasses.fields(self)]
        given = [name for name in names if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = f"it has {', '.join(given)}" if given else "it has none"
            raise RequestError(f"structured_outputs needs exactly one of {', '.join(names)}; {found}")
        value = getattr(self, given[0])
        match given[0]:
            case "json":
                # As text: hashable, and nobody can change it under way.
                object.__setattr__(self, "json", _schema_text(value))
            case "choice":
                object.__setattr__(self, "choice", _choices(value))
            case "regex" | "grammar" if not isinstance(value, str) or not value:
                raise RequestError(f"structured_outputs.{given[0]}={value!r} must be a non-empty string")
        length = len("".join(self.choice)) if self.choice else len(str(getattr(self, self.kind)))
        if length > MAX_GRAMMAR_LENGTH:
            raise RequestError(
                f"structured_outputs.{self.kind} has {length} characters; at most {MAX_GRAMMAR_LENGTH} are served"
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "StructuredOutputsParams":
        """Builds it from a mapping, such as a JSON object.

        Raises:
          RequestError: an unknown name, with the nearest known one, or a bad value.
        """
        _check_names(cls, fields, "field of structured_outputs")
        return cls(**fields)

    @property
    def kind(self) -> str:
        """The field that is set."""
        return next(field.name for field in dataclasses.fields(self) if getattr(self, field.name) not in (None, False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are drawn. The names and defaults are those that users of vLLM know.

    Attributes:
      n: samples of the prompt.
      max_tokens: most output tokens; None: as many as the model's length allows.
      min_tokens: output tokens before which no stop token is drawn and no stop string counts.
      temperature: 0 is greedy (argmax); larger is more random.
      top_k: draw among the `top_k` likeliest tokens; 0: all.
      top_p: draw among the likeliest tokens whose probabilities reach `top_p`.
      min_p: draw among tokens at least `min_p` times as likely as the likeliest.
      seed: makes the draws repeatable, whatever else is served; None: drawn once.
      repetition_penalty: divides (multiplies, where negative) the logits of tokens in the prompt or output.
      presence_penalty, frequency_penalty: subtracted from the logits of output tokens, once or per occurrence.
      logit_bias: token id -> added to its logit.
      stop: strings that end the text; they are not part of it unless `include_stop_str_in_output`.
      stop_token_ids: tokens that end the text.
      ignore_eos: the model's end-of-text tokens do not end the text.
      logprobs: None, or how many of the likeliest tokens to report at each output token (0: the drawn one only).
      prompt_logprobs: the same at each prompt token.
      detokenize: whether text is wanted; without it stop strings are refused.
      skip_special_tokens: whether special tokens are left out of the text.
      structured_outputs: what the text must look like (a `StructuredOutputsParams` or its fields as a mapping).

    Raises:
      RequestError: a value is out of its range, naming it.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self):
        self._check_structured_outputs()
        # Frozen so that a request cannot change under way; normalised here so that every reader sees tuples.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.logit_bias, Mapping | None):
            raise RequestError(f"logit_bias={self.logit_bias!r} must be a mapping from token ids to numbers, or None")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        if self.top_k == -1:  # vLLM's older spelling of "all"
            object.__setattr__(self, "top_k", 0)
        _check_int("n", self.n, 1, 1024)
        _check_int("max_tokens", self.max_tokens, 1, optional=True)
        _check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")
        _check_float("temperature", self.temperature, 0.0)
        _check_int("top_k", self.top_k, 0)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_int("seed", self.seed, 0, MAX_SEED, optional=True)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, open_low=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are served")
        for token, bias in self.logit_bias.items():
            _check_int("a token id of logit_bias", token, 0)
            _check_float(f"logit_bias[{token}]", bias, -100.0, 100.0)
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"stop_token_ids has {len(self.stop_token_ids)} entries; at most {MAX_STOP_TOKEN_IDS} are served"
            )
        for token in self.stop_token_ids:
            _check_int("a token id of stop_token_ids", token, 0)
        for name in ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}={getattr(self, name)!r} must be True or False")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError(f"stop={self.stop!r} must be a non-empty string or a list of such")
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need text: set detokenize=True or use stop_token_ids")

    def _check_structured_outputs(self) -> None:
        asked = self.structured_outputs
        if isinstance(asked, Mapping):
            object.__setattr__(self, "structured_outputs", StructuredOutputsParams.from_dict(asked))
        elif not isinstance(asked, StructuredOutputsParams | None):
            raise RequestError(f"structured_outputs={asked!r} must be a StructuredOutputsParams, a mapping or None")
        # The grammar says where the text may end; with these it might not end there.
        for name in ("ignore_eos", "min_tokens"):
            if asked is not None and getattr(self, name):
                raise RequestError(f"{name} cannot go with structured_outputs, which say where the text ends")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "SamplingParams":
        """Builds parameters from a mapping, such as a JSON object.

        Raises:
          RequestError: an unknown name, with the nearest known one, or a bad value.
        """
        _check_names(cls, fields, "sampling parameter")
        return cls(**fields)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_penalised(self) -> bool:
        """Whether the tokens so far bear on the next one."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked request: everything resolved, nothing left to default.

    Attributes:
      request_id: unique among live requests.
      prompt_token_ids: at least one token.
      params: how to draw.
      max_tokens: `params.max_tokens` bounded by what the model and the cache can hold.
      seed: of the draws; each sample folds in its index.
      stop_token_ids: the request's, and the model's end-of-text tokens unless ignored.
      arrival_s: when it came, on the engine's clock.
      prompt: the text, where there was one.
      streams: every token is reported, not only the end.
      priority: less goes first; requests of one priority in order of arrival.
      pace_s: the longest that pp steps in a row may take so that its tokens come in the promised time; None: nothing
        was promised.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int
    stop_token_ids: frozenset[int]
    arrival_s: float
    prompt: str | None = None
    streams: bool = False
    priority: int = 0
    pace_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Logprob:
    """Log-probability of a token under the model, before temperature, penalties and filters.

    Attributes:
      logprob: natural logarithm.
      token: its text, where text is wanted and there is a tokenizer.
    """

    logprob: float
    token: str | None = None


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One sample so far.

    Attributes:
      logprobs: for each token, the drawn token and the likeliest ones, likeliest first; None if not asked.
      finish_reason: ``stop`` (a stop token or string), ``length``, ``abort``; None while it runs.
      stop_reason: the stop string or token id that was met; None for the model's own end of text, and where a
        grammar was complete. With ``abort``, why a grammar could not be followed any further.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclasses.dataclass(frozen=True)
class RequestMetrics:
    """Times of a request in seconds on the engine's clock; None where it has not happened.

    Attributes:
      token_s: for each sample, when each output token became known.
      num_preemptions: summed over samples.
      num_cached_tokens: leading tokens of the prompt that were not computed, because the cache held them already, when
        the first sample started.
    """

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    token_s: tuple[tuple[float, ...], ...] = ()
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: arrival to first output token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A request and what came of it so far; complete once `finished`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None


def _check_names(cls: type, names: Iterable[str], what: str) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            raise RequestError(f"unknown {what} {name!r}{hint}")


def _schema_text(value: Any) -> str:
    """A JSON schema as the text of a JSON object."""
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        if not isinstance(schema, Mapping):
            raise RequestError(f"structured_outputs.json must be a schema that is an object, not {schema!r}")
        if "x-guidance" in schema:
            raise RequestError("structured_outputs.json: x-guidance is not served; leave it out")
        return json.dumps(dict(schema), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"structured_outputs.json is no JSON: {error}") from None


def _choices(value: Any) -> tuple[str, ...]:
    choices = () if isinstance(value, str) else _tuple("structured_outputs.choice", value)
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise RequestError(f"structured_outputs.choice={value!r} must be a list of non-empty strings")
    return choices


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Iterable | None):
        raise RequestError(f"{name}={value!r} must be a list or None")
    return tuple(value or ())


def _check_int(name: str, value: Any, low: int, high: int | None = None, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name}={value!r} must be an integer {limit}{' or None' if optional else ''}")


def _check_float(name: str, value: Any, low: float, high: float = math.inf, open_low: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value > high or value < low or (open_low and value == low):
        limit = f"{'above' if open_low else 'at least'} {low}" + ("" if high == math.inf else f" and at most {high}")
        raise RequestError(f"{name}={value!r} must be a finite number {limit}")
