"""Tool calls: the grammar that makes them parse, and their parsing.

- A named function: the whole text is its arguments, by its JSON schema.
- `required`: the whole text is a JSON array of calls.
- `auto`: the model decides. A call is written as Hermes and Qwen models do,
  ``<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>``, between or after words. Once a text has opened a
  call, the grammar lets nothing follow but a call of one of the functions.
"""

import json
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from sarathi_jax.request import StructuredOutputsParams
from sarathi_jax.server.errors import ApiError
from sarathi_jax.server.schemas import ChatBody, FunctionDefinition, NamedToolChoice

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_CALLS = 16
"""Most calls of one answer with `required`."""

# As the models have seen JSON: one space behind commas and colons.
_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

type Piece = dict[str, Any]
"""Part of a message, as the `delta` of a stream has it."""


class Reader(Protocol):
    """Turns the text of a sample into parts of a message."""

    has_calls: bool

    def push(self, text: str) -> list[Piece]:
        """Takes further text; returns what is certain now."""
        ...

    def finish(self) -> list[Piece]:
        """The rest."""
        ...


class PlainReader:
    """Text is content."""

    has_calls = False

    def push(self, text: str) -> list[Piece]:
        return [{"content": text}] if text else []

    def finish(self) -> list[Piece]:
        return []


class NamedReader:
    """Text is the arguments of one call."""

    def __init__(self, name: str):
        self.has_calls = False
        self._name = name

    def push(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self.has_calls:
            return [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]}]
        self.has_calls = True
        return [_call(0, self._name, text)]

    def finish(self) -> list[Piece]:
        return []


class RequiredReader:
    """Text is a JSON array of calls, told when it is complete."""

    def __init__(self):
        self.has_calls = False
        self._text = ""

    def push(self, text: str) -> list[Piece]:
        self._text += text
        return []

    def finish(self) -> list[Piece]:
        try:
            calls = json.loads(self._text)
        except ValueError:  # cut off by the length
            return [{"content": self._text}] if self._text else []
        self.has_calls = True
        return [_call(i, call["name"], _text(call["arguments"])) for i, call in enumerate(calls)]


class AutoReader:
    """Text is content with calls in it; a call is told when it is complete."""

    def __init__(self):
        self.has_calls = False
        self._num_calls = 0
        self._text = ""

    def push(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while (start := self._text.find(OPEN)) >= 0:
            call, end = _read_call(self._text, start + len(OPEN))
            if call is None:
                break
            pieces += _content(self._text[:start].rstrip())
            pieces.append(_call(self._num_calls, call["name"], _text(call["arguments"])))
            self._num_calls += 1
            self.has_calls = True
            self._text = self._text[end:]
        # What may yet turn out to belong to a call is held back, with the white space before it.
        certain = self._text[:start] if start >= 0 else self._text[: len(self._text) - _overlap(self._text)]
        certain = certain.rstrip()
        self._text = self._text[len(certain) :]
        return pieces + _content(certain)

    def finish(self) -> list[Piece]:
        return _content(self._text.rstrip() if self.has_calls else self._text)


class ToolUse:
    """How the tools of one call are used.

    Args:
      body: of the call.

    Raises:
      ApiError: a choice that makes no sense.
    """

    def __init__(self, body: ChatBody):
        self._functions = [tool.function for tool in body.tools or ()]
        choice = body.tool_choice or ("auto" if self._functions else "none")
        if choice != "none" and not self._functions:
            raise ApiError(400, "tool_choice needs tools", param="tool_choice", code="invalid_value")
        self._named = None
        if isinstance(choice, NamedToolChoice):
            self._named = choice.function.name
            if self._named not in [function.name for function in self._functions]:
                message = f"tool_choice names {self._named!r}, which is not among the tools"
                raise ApiError(400, message, param="tool_choice", code="invalid_value")
        self._choice = choice
        self._is_parallel = body.parallel_tool_calls is not False

    @property
    def is_used(self) -> bool:
        return self._choice != "none"

    def constraint(self) -> StructuredOutputsParams | None:
        """What the text must look like; None: like anything.

        Raises:
          RequestError: a schema that is none.
        """
        if self._named is not None:
            function = next(function for function in self._functions if function.name == self._named)
            return StructuredOutputsParams(json=_parameters(function))
        if self._choice == "required":
            most = MAX_CALLS if self._is_parallel else 1
            schema = _calls_schema(self._functions)
            defs = {"$defs": schema.pop("$defs")}
            return StructuredOutputsParams(
                json={"type": "array", "items": schema, "minItems": 1, "maxItems": most} | defs
            )
        if self._choice == "auto":
            schema = _calls_schema(self._functions) | {"x-guidance": _SPACED}
            start = "call* words" if self._is_parallel else "call | words"
            return StructuredOutputsParams(
                grammar=f"start: {start}\n"
                f'call: opening "\\n" body "\\n{CLOSE}"\n'
                f"body: %json {json.dumps(schema)}\n"
                f"opening[lazy]: /(.|\\n)*{OPEN}/\n"
                "words: /(.|\\n)*/"
            )
        return None

    def reader(self) -> Reader:
        """For one sample."""
        if self._named is not None:
            return NamedReader(self._named)
        if self._choice == "required":
            return RequiredReader()
        return AutoReader() if self._choice == "auto" else PlainReader()


def instructions(tools: Sequence[dict[str, Any]]) -> str:
    """What a model is told of the tools whose chat template does not do it."""
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = '{"name": NAME, "arguments": {...}}'
    return f"You may call these functions:\n{lines}\nTo call one, write\n{OPEN}\n{example}\n{CLOSE}"


def message_of(pieces: Sequence[Piece]) -> dict[str, Any]:
    """A whole message out of its parts."""
    content, calls = "", []
    for piece in pieces:
        content += piece.get("content", "")
        for call in piece.get("tool_calls", ()):
            if call["index"] == len(calls):
                calls.append({name: value for name, value in call.items() if name != "index"})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    return message | ({"tool_calls": calls} if calls else {})


def _call(index: int, name: str, arguments: str) -> Piece:
    function = {"name": name, "arguments": arguments}
    return {
        "tool_calls": [
            {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        ]
    }


def _content(text: str) -> list[Piece]:
    return [{"content": text}] if text else []


def _text(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _read_call(text: str, start: int) -> tuple[dict[str, Any] | None, int]:
    """The call that begins at `start` and where it ends; None while it is not complete."""
    while start < len(text) and text[start].isspace():
        start += 1
    try:
        call, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start
    closing = text.find(CLOSE, end)
    if closing < 0 or not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
        return None, start
    return call, closing + len(CLOSE)


def _overlap(text: str) -> int:
    """Length of the longest end of a text that may be the beginning of a call."""
    return next((n for n in range(min(len(text), len(OPEN)), 0, -1) if text.endswith(OPEN[:n])), 0)


def _parameters(function: FunctionDefinition) -> dict[str, Any]:
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object"} | function.parameters


def _calls_schema(functions: Sequence[FunctionDefinition]) -> dict[str, Any]:
    """Of one call of any of the functions; each function's own references still lead where they did."""
    defs, calls = {}, []
    for i, function in enumerate(functions):
        defs[f"tool{i}"] = _moved(_parameters(function), f"#/$defs/tool{i}")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, "arguments": {"$ref": f"#/$defs/tool{i}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls, "$defs": defs}


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references to itself lead to where it stands now."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:] if key == "$ref" and isinstance(value, str) and value[:1] == "#" else _moved(value, root)
        for key, value in schema.items()
    }
