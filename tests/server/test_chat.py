"""`/v1/chat/completions`: templates, shapes of answers, tool calls, log-probabilities."""

import json
from typing import Any

import jsonschema
import pytest

from sarathi_jax.request import SamplingParams
from sarathi_jax.server.calls import message_of
from sarathi_jax.server.schemas import ChatBody
from sarathi_jax.server.tools import ToolUse
from sarathi_jax.structured import Grammars
from tests.server.running import MODEL, events, with_server
from tests.server.test_completions import post

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "the cat"}]
BODY: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 10}
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["rome", "oslo"]}},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "stop"}},
]


def test_says_what_the_library_says(tiny):
    llm, _ = tiny.face(num_blocks=256)
    conversation = [*MESSAGES, {"role": "assistant", "content": "on"}, {"role": "user", "content": "mat"}]
    parts = [*conversation[:-1], {"role": "user", "content": [{"type": "text", "text": "mat"}]}]
    expected = llm.chat(conversation, SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)[0]
    stop = [*conversation], {"stop": ["e"], "max_completion_tokens": 10, "max_tokens": None}
    answers = post(
        tiny,
        BODY | {"messages": conversation},
        BODY | {"messages": parts},
        BODY | {"messages": conversation, "stream": True, "stream_options": {"include_usage": True}},
        BODY | {"messages": stop[0]} | stop[1],
        path=PATH,
    )
    for answer in answers[:2]:
        message = answer.json()["choices"][0]["message"]
        assert (message["role"], message["content"]) == ("assistant", expected.outputs[0].text)
        assert "tool_calls" not in message
    first, *pieces, last = events(answers[2])
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in pieces) == expected.outputs[0].text
    assert pieces[-1]["choices"][0]["finish_reason"] == expected.outputs[0].finish_reason
    assert last["usage"]["completion_tokens"] == answers[0].json()["usage"]["completion_tokens"]
    assert answers[3].json()["choices"][0]["message"]["content"] == expected.outputs[0].text.partition("e")[0]


def test_logprobs(tiny):
    whole, stream = post(
        tiny,
        BODY | {"logprobs": True, "top_logprobs": 2, "n": 2, "seed": 3, "temperature": 1.0},
        BODY | {"logprobs": True, "top_logprobs": 2, "n": 2, "seed": 3, "temperature": 1.0, "stream": True},
        path=PATH,
    )
    for choice in whole.json()["choices"]:
        content = choice["logprobs"]["content"]
        assert all(len(entry["top_logprobs"]) == 2 for entry in content)
        assert all(bytes(entry["bytes"]).decode(errors="replace") == entry["token"] for entry in content)
        mine = [e["choices"][0] for e in events(stream) if e["choices"][0]["index"] == choice["index"]]
        streamed = [entry for piece in mine if piece["logprobs"] for entry in piece["logprobs"]["content"]]
        assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]


def test_response_format(tiny):
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    formats = [{"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}, {"type": "text"}]
    shaped, plain = post(tiny, *[BODY | {"max_tokens": 60, "response_format": f} for f in formats], path=PATH)
    assert shaped.json()["choices"][0]["finish_reason"] == "stop"
    jsonschema.validate(json.loads(shaped.json()["choices"][0]["message"]["content"]), schema)
    assert plain.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_tools_that_must_be_called(tiny, stream):
    named = {"type": "function", "function": {"name": "weather"}}
    bodies = [
        BODY | {"max_tokens": 100, "tools": TOOLS, "parallel_tool_calls": False, "stream": stream} | {"tool_choice": c}
        for c in (named, "required")
    ]
    for answer in post(tiny, *bodies, path=PATH):
        assert answer.status_code == 200, answer.text
        if stream:
            choices = [event["choices"][0] for event in events(answer)]
            message, reason = message_of([choice["delta"] for choice in choices]), choices[-1]["finish_reason"]
        else:
            message = answer.json()["choices"][0]["message"]
            reason = answer.json()["choices"][0]["finish_reason"]
        assert reason == "tool_calls"
        (call,) = message["tool_calls"]
        assert call["id"].startswith("call_")
        schema = CITY if call["function"]["name"] == "weather" else {"type": "object", "maxProperties": 0}
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
        assert message["content"] is None or message["content"] == ""


def test_a_call_that_is_begun_is_finished_as_one(tiny):
    """With `auto` the model may say anything, until it has opened a call."""
    tools = ToolUse(ChatBody.model_validate(BODY | {"tools": TOOLS}))
    matcher = Grammars(tiny.tokenizer, tiny.model.vocab_size, tiny.model.eos_token_ids).matcher(tools.constraint())
    text = 'well <tool_call>\n{"name": "weather", "arguments": {"city": "oslo"}}\n</tool_call>'
    for token in tiny.tokenizer.encode(text, add_special_tokens=False):
        assert matcher.allowed[token // 32] >> (token % 32) & 1, tiny.tokenizer.decode([token])
        matcher.advance(token)
        assert matcher.error is None
    reader = tools.reader()
    message = message_of([piece for character in text for piece in reader.push(character)] + reader.finish())
    assert message["content"] == "well"
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "oslo"}'}


def test_a_history_with_tools(tiny):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "oslo"}'}}
    history = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    history.append({"role": "tool", "tool_call_id": "1", "content": "rain"})
    (answer,) = post(tiny, BODY | {"messages": history, "max_tokens": 3}, path=PATH)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_completion_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "tools": TOOLS}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"functions": []}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_refuses_by_name(tiny, fields, param):
    (answer,) = post(tiny, BODY | fields, path=PATH)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_tokenize_and_back(tiny):
    async def talk(client, front):
        text = await client.post("/tokenize", json={"prompt": "the cat"})
        chat = await client.post("/tokenize", json={"messages": MESSAGES})
        back = await client.post("/detokenize", json={"tokens": text.json()["tokens"]})
        bad = await client.post("/detokenize", json={"tokens": [10**9]})
        return text.json(), chat.json(), back.json(), bad.status_code

    text, chat, back, bad = with_server(tiny, talk)
    assert text["tokens"] == tiny.tokenizer.encode("the cat")
    assert text["count"] == len(text["tokens"])
    assert chat["tokens"] == tiny.llm.chat_tokens(MESSAGES)
    assert back == {"prompt": "the cat"}
    assert bad == 400
