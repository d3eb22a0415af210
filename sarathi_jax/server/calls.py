"""Reads tool calls while their text is made: first the name of a call, then its arguments as they come.

The grammars of `tools` make the texts. Arguments are handed on as the model wrote them, so that what was streamed is
the whole answer, however its text was cut into pieces.
"""

import re
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

OPEN, CLOSE = "<tool_call>", "</tool_call>"

type Piece = dict[str, Any]
"""Part of a message, as the `delta` of a stream has it."""

_HEAD = r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\S)'
_AUTO = re.compile(OPEN + _HEAD), re.compile(rf"\s*\}}\s*{CLOSE}")
_REQUIRED = re.compile(r"[\[,]" + _HEAD), re.compile(r"\s*\}")


class Reader(Protocol):
    """Turns the text of a sample into parts of a message."""

    @property
    def calls_are_complete(self) -> bool:
        """There are calls, and the last of them has ended."""
        ...

    def push(self, text: str) -> list[Piece]:
        """Takes further text; returns what is certain now."""
        ...

    def finish(self) -> list[Piece]:
        """The rest."""
        ...


class PlainReader:
    """Text is content."""

    calls_are_complete = False

    def push(self, text: str) -> list[Piece]:
        return _content(text)

    def finish(self) -> list[Piece]:
        return []


class NamedReader:
    """Text is the arguments of one call.

    Args:
      name: of the function.
    """

    def __init__(self, name: str):
        self._name = name
        self._value: _Value | None = None

    @property
    def calls_are_complete(self) -> bool:
        return self._value is not None and not self._value.is_open

    def push(self, text: str) -> list[Piece]:
        if not text:
            return []
        pieces = []
        if self._value is None:
            self._value = _Value()
            pieces.append(_call(0, self._name))
        self._value.end(text)
        return [*pieces, _arguments(0, text)]

    def finish(self) -> list[Piece]:
        return []


class CallsReader:
    """Text has calls in it.

    Args:
      head: what a call begins with, up to its arguments; its group is the name.
      tail: what comes behind the arguments.
      opening: text that a call begins with, which is held back until it is known to be one; None: nothing is content,
        unless no call begins at all.
    """

    def __init__(self, head: re.Pattern[str], tail: re.Pattern[str], opening: str | None):
        self._head, self._tail, self._opening = head, tail, opening
        self._num_calls = 0
        self._value: _Value | None = None  # the arguments of a call that has no tail yet
        self._text = ""

    @property
    def calls_are_complete(self) -> bool:
        return self._num_calls > 0 and (self._value is None or self._value.is_complete)

    def push(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while self._read_arguments(pieces):
            head = self._head.search(self._text)
            if head is None:
                return pieces + self._words()
            if self._opening is not None:
                pieces += _content(self._text[: head.start()].rstrip())
            pieces.append(_call(self._num_calls, head[1]))
            self._num_calls += 1
            self._value = _Value()
            self._text = self._text[head.end() :]
        return pieces

    def finish(self) -> list[Piece]:
        if self._value is not None:  # cut off in a call
            return []
        if self._num_calls == 0:
            return _content(self._text)
        return [] if self._opening is None else _content(self._text.rstrip())

    def _read_arguments(self, pieces: list[Piece]) -> bool:
        """Goes on with the call that has begun; whether it is over, or there is none."""
        if self._value is None:
            return True
        if not self._value.is_complete:
            end = self._value.end(self._text)
            if end:
                pieces.append(_arguments(self._num_calls - 1, self._text[:end]))
                self._text = self._text[end:]
        tail = self._tail.match(self._text) if self._value.is_complete else None
        if tail is None:
            return False
        self._text = self._text[tail.end() :]
        self._value = None
        return True

    def _words(self) -> list[Piece]:
        """What certainly belongs to no call; the white space before a call is left out."""
        if self._opening is None:
            return []
        start = self._text.find(self._opening)
        if start < 0:
            start = len(self._text) - _overlap(self._text, self._opening)
        certain = self._text[:start].rstrip()
        self._text = self._text[len(certain) :]
        return _content(certain)


def auto_reader() -> Reader:
    """Of words with calls between `OPEN` and `CLOSE`."""
    return CallsReader(*_AUTO, OPEN)


def required_reader() -> Reader:
    """Of a JSON array of calls."""
    return CallsReader(*_REQUIRED, None)


def message_of(pieces: Sequence[Piece]) -> dict[str, Any]:
    """A whole message out of its parts."""
    content, calls = "", []
    for piece in pieces:
        content += piece.get("content", "")
        for call in piece.get("tool_calls", ()):
            if call["index"] == len(calls):
                calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    return message | ({"tool_calls": calls} if calls else {})


class _Value:
    """Finds the end of a JSON value that comes in pieces."""

    def __init__(self):
        self.is_complete = False
        self._depth = 0
        self._in_string = self._is_escaped = False

    @property
    def is_open(self) -> bool:
        """Within brackets or quotes."""
        return self._depth > 0 or self._in_string

    def end(self, text: str) -> int:
        """Takes further text; how much of it belongs to the value."""
        for i, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif self._depth == 0 and (character in ",}]" or character.isspace()):  # behind a number or a word
                self.is_complete = True
                return i
            elif character in "}]":
                self._depth -= 1
            else:
                continue
            if not self.is_open:
                self.is_complete = True
                return i + 1
        return len(text)


def _call(index: int, name: str) -> Piece:
    """The beginning of a call."""
    call = {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
    return {"tool_calls": [call | {"function": {"name": name, "arguments": ""}}]}


def _arguments(index: int, text: str) -> Piece:
    return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _content(text: str) -> list[Piece]:
    return [{"content": text}] if text else []


def _overlap(text: str, opening: str) -> int:
    """Length of the longest end of a text that may be the beginning of a call."""
    return next((n for n in range(min(len(text), len(opening)), 0, -1) if text.endswith(opening[:n])), 0)
