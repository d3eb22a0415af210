"""One line of a batch job: a JSON object in, a JSON object out."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from sarathi_jax.request import Logprob, RequestError, RequestOutput, SamplingParams

Logprobs = dict[int, Logprob]
_KEYS = ("id", "prompt", "prompt_token_ids", "messages", "sampling_params")
_PROMPTS = ("prompt", "prompt_token_ids", "messages")


class RowError(ValueError):
    """An input row that cannot be served; the message says why. Other rows are not affected."""


@dataclasses.dataclass(frozen=True)
class InputRow:
    """What one input line asks.

    Attributes:
      line: its number in the input file, from 1: the key of the job, unique even where ids are not.
      row_id: the line's own `id`, or the line number.
      params: of the job, overridden by the line's own.
      prompt: text or token ids; None for a chat.
      messages: of a chat; None otherwise.
    """

    line: int
    row_id: str | int
    params: SamplingParams
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None


def parse_row(text: bytes, line: int, defaults: Mapping[str, Any]) -> InputRow:
    """Reads one input line.

    Args:
      text: the line: a JSON object with one of `prompt`, `prompt_token_ids` and `messages`, and perhaps `id` and
        `sampling_params`.
      line: its number, from 1.
      defaults: sampling parameters of the job.

    Raises:
      RowError: the line is no such object, naming what is wrong.
    """
    fields = _load(text)
    unknown = [key for key in fields if key not in _KEYS]
    if unknown:
        raise RowError(f"unknown key {unknown[0]!r}; a row has {', '.join(_KEYS)}")
    kinds = [key for key in _PROMPTS if fields.get(key) is not None]
    if len(kinds) != 1:
        raise RowError(f"a row needs exactly one of {', '.join(_PROMPTS)}; this one has {', '.join(kinds) or 'none'}")
    kind = kinds[0]
    prompt = {"messages" if kind == "messages" else "prompt": _prompt(kind, fields[kind])}
    return InputRow(line, read_id(text, line), _params(fields, defaults), **prompt)


def read_id(text: bytes, line: int) -> str | int:
    """The `id` of an input line, or its number where it has none or cannot be read."""
    try:
        row_id = _load(text).get("id")
    except RowError:
        return line
    return row_id if isinstance(row_id, str | int) and not isinstance(row_id, bool) else line


def output_fields(output: RequestOutput) -> dict[str, Any]:
    """A finished request as a JSON object: prompt, outputs, counts and times in seconds."""
    fields: dict[str, Any] = {"prompt": output.prompt, "prompt_token_ids": list(output.prompt_token_ids)}
    if output.prompt_logprobs is not None:
        fields["prompt_logprobs"] = [None if item is None else _logprobs(item) for item in output.prompt_logprobs]
    fields["outputs"] = [
        {
            "index": sample.index,
            "text": sample.text,
            "token_ids": list(sample.token_ids),
            **({} if sample.logprobs is None else {"logprobs": [_logprobs(item) for item in sample.logprobs]}),
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        for sample in output.outputs
    ]
    metrics = output.metrics
    fields["metrics"] = {
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_output_tokens": sum(len(sample.token_ids) for sample in output.outputs),
        "ttft_s": metrics.ttft_s,
        "latency_s": None if metrics.finished_s is None else metrics.finished_s - metrics.arrival_s,
        "num_preemptions": metrics.num_preemptions,
    }
    return fields


def dump(fields: Mapping[str, Any]) -> str:
    """A JSON object on one line, valid UTF-8 whatever its texts hold."""
    text = json.dumps(fields, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
        return json.dumps(fields, allow_nan=False)
    return text


def _load(text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RowError(f"a row is a JSON object, not {type(fields).__name__}")
    return fields


def _prompt(kind: str, value: Any) -> Any:
    if kind == "prompt":
        if not isinstance(value, str):
            raise RowError(f"prompt must be a text; for token ids say prompt_token_ids (it is {type(value).__name__})")
        return value
    item = Mapping if kind == "messages" else int
    if not isinstance(value, list) or not value or any(isinstance(x, bool) or not isinstance(x, item) for x in value):
        what = "objects with role and content" if kind == "messages" else "integers"
        raise RowError(f"{kind} must be a non-empty list of {what}")
    return tuple(value)


def _params(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    own = fields.get("sampling_params") or {}
    if not isinstance(own, dict):
        raise RowError(f"sampling_params must be an object, not {type(own).__name__}")
    merged = {**defaults, **own}
    try:
        if isinstance(merged.get("logit_bias"), Mapping):  # JSON has no integer keys
            merged["logit_bias"] = {int(token): bias for token, bias in merged["logit_bias"].items()}
        return SamplingParams.from_dict(merged)
    except (RequestError, TypeError, ValueError) as error:
        raise RowError(f"sampling_params: {error}") from None


def _logprobs(table: Logprobs) -> list[dict[str, Any]]:
    return [
        {
            "token_id": token_id,
            "token": item.token,
            "logprob": item.logprob if math.isfinite(item.logprob) else None,  # JSON has no infinity
        }
        for token_id, item in table.items()
    ]
