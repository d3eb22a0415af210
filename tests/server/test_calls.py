"""Tool calls are read the same however their text is cut into pieces, and streamed as early as can be."""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sarathi_jax.server.calls import NamedReader, PlainReader, Reader, auto_reader, message_of, required_reader

TRICKY = '{"x": "</tool_call>}],\\" \\\\", "y": [{"z": {}}, "[{"], "é": 1}'
AUTO = (
    f'a <b> \n<tool_call>{{"name": "f", "arguments": {TRICKY}}}</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call> end <tool'
)
REQUIRED = f'[{{"name":"f","arguments":{TRICKY}}},{{"name":"g","arguments":{{}}}},{{"name":"h","arguments":[1,"a"]}}]'
TEXTS: dict[str, tuple[Callable[[], Reader], str]] = {
    "auto": (auto_reader, AUTO),
    "required": (required_reader, REQUIRED),
    "named": (lambda: NamedReader("f"), TRICKY),
    "plain": (PlainReader, AUTO),
    "numbers": (required_reader, '[{"name": "f", "arguments": -1.5e3 }, {"name": "g", "arguments": "a\\"b"}]'),
}


def read(reader: Reader, pieces: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """The message without what is random, and whether its calls are complete."""
    message = message_of([part for piece in pieces for part in reader.push(piece)] + reader.finish())
    for call in message.get("tool_calls", ()):
        assert call.pop("id").startswith("call_")
    return message, reader.calls_are_complete


@pytest.mark.parametrize("name", TEXTS)
def test_every_split_reads_the_same(name):
    """Also of texts that end too early: what was streamed is what the whole answer has."""
    reader, text = TEXTS[name]
    for end in range(len(text) + 1):
        assert read(reader(), text[:end]) == read(reader(), [text[:end]])
    whole = read(reader(), [text])
    for split in range(len(text)):
        assert read(reader(), [text[:split], text[split:]]) == whole
    for first, second in itertools.combinations(range(0, len(text), 5), 2):
        assert read(reader(), [text[:first], text[first:second], text[second:]]) == whole


def test_calls_and_words():
    message, are_complete = read(auto_reader(), [AUTO])
    functions = [call["function"] for call in message["tool_calls"]]
    assert [function["name"] for function in functions] == ["f", "g"]
    assert functions[0]["arguments"] == TRICKY
    assert message["content"] == "a <b> end <tool"
    assert are_complete
    message, are_complete = read(required_reader(), [REQUIRED])
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": call["name"], "arguments": arguments}
        for call, arguments in zip(json.loads(REQUIRED), (TRICKY, "{}", '[1,"a"]'), strict=True)
    ]
    assert message["content"] is None
    assert are_complete


def test_what_was_cut_off():
    assert read(required_reader(), ['[{"name": "f"'])[0]["content"] == '[{"name": "f"'
    message, are_complete = read(required_reader(), ['[{"name": "f", "arguments": {"a": "b'])
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": "b'}
    assert not are_complete
    assert (
        read(auto_reader(), ['so <tool_call>\n{"name": "f", "arg'])[0]["content"]
        == 'so <tool_call>\n{"name": "f", "arg'
    )
    message, are_complete = read(auto_reader(), ['<tool_call>\n{"name": "f", "arguments": {}}\n</tool'])
    assert (message["content"], are_complete) == (None, True)
    assert not read(NamedReader("f"), ['{"a": [1'])[1]


@pytest.mark.parametrize("name", ["auto", "required", "named"])
def test_nothing_waits_for_the_end_of_a_call(name):
    """The name comes first and alone; then every character of the arguments at once."""
    make, text = TEXTS[name]
    reader, start = make(), text.index(TRICKY)
    pieces = [part for character in text[: start + 1] for part in reader.push(character)]
    head, first = [piece["tool_calls"][0] for piece in pieces if "tool_calls" in piece]
    assert (head["function"], head["type"], head["index"]) == ({"name": "f", "arguments": ""}, "function", 0)
    assert first == {"index": 0, "function": {"arguments": "{"}}
    for character in TRICKY[1:]:
        assert reader.push(character) == [{"tool_calls": [{"index": 0, "function": {"arguments": character}}]}]
