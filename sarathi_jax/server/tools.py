"""Tool calls: the grammar that makes them parse; `calls` reads them.

- A named function: the whole text is its arguments, by its JSON schema.
- `required`: the whole text is a JSON array of calls.
- `auto`: the model decides. A call is written as Hermes and Qwen models do,
  ``<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>``, between or after words. Once a text has opened a
  call, the grammar lets nothing follow but a call of one of the functions.
"""

import json
from collections.abc import Sequence
from typing import Any

from sarathi_jax.request import StructuredOutputsParams
from sarathi_jax.server.calls import CLOSE, OPEN, NamedReader, PlainReader, Reader, auto_reader, required_reader
from sarathi_jax.server.errors import ApiError
from sarathi_jax.server.schemas import ChatBody, FunctionDefinition, NamedToolChoice

MAX_CALLS = 16
"""Most calls of one answer with `required`."""

# As the models have seen JSON: one space behind commas and colons.
_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


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
            return required_reader()
        return auto_reader() if self._choice == "auto" else PlainReader()


def instructions(tools: Sequence[dict[str, Any]]) -> str:
    """What a model is told of the tools whose chat template does not do it."""
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = '{"name": NAME, "arguments": {...}}'
    return f"You may call these functions:\n{lines}\nTo call one, write\n{OPEN}\n{example}\n{CLOSE}"


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
