"""The `openai` client: every option, whole and streamed, sync and async, has the library's answer."""

import asyncio
import copy
import dataclasses
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from sarathi_jax.request import SamplingParams, StructuredOutputsParams
from sarathi_jax.server.calls import message_of
from sarathi_jax.server.schemas import ChatBody
from sarathi_jax.server.tools import ToolUse, instructions
from tests.engine.serving import Served
from tests.server.processes import Process
from tests.server.test_chat import CITY, MESSAGES, TOOLS

pytestmark = pytest.mark.slow

PROMPT = "the quick brown fox"
IDS = [1, 40, 60, 80, 100]
NAMED = {"type": "function", "function": {"name": "weather"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}

COMPLETIONS: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 20},
    "seeded": {"max_tokens": 10, "temperature": 0.8, "top_p": 0.9, "seed": 7, "n": 3},
    "stop and penalties": {"max_tokens": 30, "stop": ["e "], "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "biased, with logprobs": {"max_tokens": 6, "logit_bias": {"40": 3.0}, "logprobs": 2},
    "echo": {"max_tokens": 5, "echo": True},
    "echo with logprobs": {"max_tokens": 5, "echo": True, "logprobs": 3},
    "token ids": {"prompt": IDS, "max_tokens": 8},
    "batch of texts": {"prompt": [PROMPT, "a cat", "rain"], "max_tokens": 8, "n": 2, "seed": 3, "temperature": 1.0},
    "batch of token ids": {"prompt": [IDS, IDS[:3]], "max_tokens": 8, "logprobs": 1, "echo": True},
    "beyond OpenAI": {"max_tokens": 9, "extra_body": {"top_k": 3, "repetition_penalty": 1.3, "ignore_eos": True}},
}

CHATS: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 12},
    "seeded": {"max_completion_tokens": 10, "temperature": 0.9, "top_p": 0.9, "seed": 11, "n": 3},
    "stop": {"max_tokens": 40, "stop": ["e", "zz"]},
    "penalties": {"max_tokens": 25, "presence_penalty": 0.7, "frequency_penalty": 0.6},
    "bias": {"max_tokens": 10, "logit_bias": {"40": 3.0, "50": -100}},
    "logprobs": {"max_tokens": 8, "logprobs": True, "top_logprobs": 3, "n": 2},
    "json_object": {"max_tokens": 60, "response_format": {"type": "json_object"}},
    "json_schema": {"max_tokens": 100, "response_format": SCHEMA},
    "tools, none": {"max_tokens": 12, "tools": TOOLS, "tool_choice": "none"},
    "tools, auto": {"max_tokens": 12, "tools": TOOLS, "tool_choice": "auto"},
    "tools, required": {"max_tokens": 120, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    "tools, required, several": {"max_tokens": 150, "tools": TOOLS, "tool_choice": "required", "seed": 5},
    "tools, named": {"max_tokens": 100, "tools": TOOLS, "tool_choice": NAMED},
}


@dataclasses.dataclass
class Choice:
    """An answer, however it came.

    Attributes:
      calls: name and arguments of each tool call.
      tokens: with log-probabilities, the text of each token.
      logprobs: of each token; None for the first of a prompt.
      num_top: how many alternatives each token has.
    """

    text: str = ""
    finish_reason: str | None = None
    calls: list[list[str]] = dataclasses.field(default_factory=list)
    tokens: list[str] = dataclasses.field(default_factory=list)
    logprobs: list[float | None] = dataclasses.field(default_factory=list)
    num_top: list[int] = dataclasses.field(default_factory=list)

    def add(self, part: Any) -> None:
        """Takes a choice of the client: a whole one, or a piece of a stream."""
        message = getattr(part, "message", None) or getattr(part, "delta", None)
        self.text += part.text if message is None else message.content or ""
        for i, call in enumerate((message and message.tool_calls) or ()):
            index = getattr(call, "index", i)
            if index == len(self.calls):
                assert call.id.startswith("call_")
                assert call.type == "function"
                self.calls.append([call.function.name, ""])
            else:
                assert call.id is call.type is call.function.name is None
            self.calls[index][1] += call.function.arguments or ""
        given = part.logprobs
        if given is not None and message is None:
            self.tokens += given.tokens
            self.logprobs += given.token_logprobs
            self.num_top += [len(table or ()) for table in given.top_logprobs]
        elif given is not None:
            self.tokens += [entry.token for entry in given.content]
            self.logprobs += [entry.logprob for entry in given.content]
            self.num_top += [len(entry.top_logprobs) for entry in given.content]
        assert self.finish_reason is None
        self.finish_reason = part.finish_reason


class Answer:
    """All choices of an answer, and what was counted."""

    def __init__(self):
        self.choices: dict[int, Choice] = {}
        self.usage: Any = None
        self.num_pieces = 0

    def add(self, part: Any) -> "Answer":
        self.usage = part.usage or self.usage
        self.num_pieces += 1
        for choice in part.choices:
            self.choices.setdefault(choice.index, Choice()).add(choice)
        return self

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.usage.prompt_tokens, self.usage.completion_tokens, self.usage.total_tokens

    def check(self, expected: "Answer") -> None:
        assert sorted(self.choices) == sorted(expected.choices)
        for index, choice in self.choices.items():
            other = expected.choices[index]
            assert dataclasses.replace(choice, logprobs=[]) == dataclasses.replace(other, logprobs=[])
            assert len(choice.logprobs) == len(other.logprobs)
            for mine, its in zip(choice.logprobs, other.logprobs, strict=True):
                assert mine == (its if its is None else pytest.approx(its, abs=1e-4))


def all_ways(server: Process, client: openai.OpenAI, endpoint: str, fields: dict[str, Any]) -> list[Answer]:
    """The answers of sync whole, sync stream, async whole and async stream."""
    streamed = fields | {"stream": True, "stream_options": {"include_usage": True}}
    create = _endpoint(client, endpoint)
    whole = Answer().add(create(**fields))
    stream = Answer()
    for chunk in create(**streamed):
        stream.add(chunk)

    async def both() -> list[Answer]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as client:
            create = _endpoint(client, endpoint)
            whole = Answer().add(await create(**fields))
            stream, chunks = Answer(), await create(**streamed)
            assert isinstance(chunks, AsyncIterator)
            async for chunk in chunks:
                stream.add(chunk)
            return [whole, stream]

    return [whole, stream, *asyncio.run(both())]


def _endpoint(client: Any, endpoint: str) -> Any:
    return client.completions.create if endpoint == "completions" else client.chat.completions.create


def params_of(fields: dict[str, Any], **more: Any) -> SamplingParams:
    """What the library calls these options."""
    beyond = ("model", "prompt", "messages", "echo", "extra_body", "max_completion_tokens", "logprobs", "top_logprobs")
    beyond += ("tools", "tool_choice", "parallel_tool_calls", "response_format")
    params = {name: value for name, value in fields.items() if name not in beyond} | fields.get("extra_body", {})
    if "logit_bias" in fields:
        params["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    return SamplingParams(**params | more)


def completions_of_the_library(served: Served, fields: dict[str, Any]) -> list[Choice]:
    llm, _ = served.face(num_blocks=256)
    prompts = fields["prompt"]
    prompts = [prompts] if isinstance(prompts, str) or isinstance(prompts[0], int) else prompts
    num, echo = fields.get("logprobs"), fields.get("echo", False)
    params = params_of(fields, logprobs=num, prompt_logprobs=num if echo else None)
    choices = []
    for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        for sample in output.outputs:
            given = (prompt if isinstance(prompt, str) else _decode(served, prompt)) if echo else ""
            ids = [*(output.prompt_token_ids if echo else ()), *sample.token_ids]
            tables = None if num is None else [*(output.prompt_logprobs or ()), *(sample.logprobs or ())]
            choice = Choice(given + sample.text, sample.finish_reason)
            choices.append(_with_logprobs(served, choice, ids, tables))
    return choices


def chats_of_the_library(served: Served, fields: dict[str, Any]) -> list[Choice]:
    llm, _ = served.face(num_blocks=256)
    tools = ToolUse(ChatBody.model_validate(fields))
    shape, messages = tools.constraint(), list(fields["messages"])
    if tools.is_used:
        messages.insert(0, {"role": "system", "content": instructions(fields["tools"])})
    if (wanted := fields.get("response_format")) is not None:
        schema = wanted.get("json_schema", {}).get("schema")
        shape = StructuredOutputsParams(json_object=True) if schema is None else StructuredOutputsParams(json=schema)
    num = fields.get("top_logprobs", 0) if fields.get("logprobs") else None
    max_tokens = fields.get("max_tokens") or fields["max_completion_tokens"]
    params = params_of(fields, structured_outputs=shape, logprobs=num, max_tokens=max_tokens)
    choices = []
    for sample in llm.chat(messages, params, use_tqdm=False)[0].outputs:
        reader = tools.reader()
        message = message_of(reader.push(sample.text) + reader.finish())
        reason = "tool_calls" if reader.calls_are_complete and sample.finish_reason == "stop" else sample.finish_reason
        calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", ())]
        choice = Choice(message["content"] or "", reason, calls)
        choice = _with_logprobs(served, choice, sample.token_ids, sample.logprobs)
        if num is not None:
            choice.num_top = [num] * len(sample.token_ids)
        choices.append(choice)
    return choices


def _with_logprobs(served: Served, choice: Choice, ids: Iterable[int], tables: Sequence[Any] | None) -> Choice:
    if tables is not None:
        ids = list(ids)
        choice.tokens = [_decode(served, [token]) for token in ids]
        choice.logprobs = [table and table[token].logprob for token, table in zip(ids, tables, strict=True)]
        texts = [{_decode(served, [i]) for i in table or ()} for table in tables]
        choice.num_top = [len(each) for each in texts]
    return choice


def _decode(served: Served, ids: Sequence[int]) -> str:
    assert served.tokenizer is not None
    return served.tokenizer.decode(ids, skip_special_tokens=len(ids) > 1)


def check_all(answers: list[Answer], choices: list[Choice]) -> None:
    expected = Answer()
    expected.choices = dict(enumerate(choices))
    for answer in answers:
        answer.check(expected)
        assert answer.counts == answers[0].counts
    assert answers[0].num_pieces == answers[2].num_pieces == 1
    assert min(answers[1].num_pieces, answers[3].num_pieces) > 1


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions(tiny, server, client, name):
    fields = {"model": "tiny", "prompt": PROMPT, "temperature": 0} | COMPLETIONS[name]
    check_all(all_ways(server, client, "completions", fields), completions_of_the_library(tiny, fields))


@pytest.mark.parametrize("name", CHATS)
def test_chats(tiny, server, client, name):
    fields = {"model": "tiny", "messages": MESSAGES, "temperature": 0} | copy.deepcopy(CHATS[name])
    choices = chats_of_the_library(tiny, fields)
    check_all(all_ways(server, client, "chats", fields), choices)
    if name == "json_schema":
        jsonschema.validate(json.loads(choices[0].text), CITY)
    if name in ("tools, required", "tools, named"):
        assert [choice.finish_reason for choice in choices] == ["tool_calls"]
        ((called, arguments),) = choices[0].calls
        jsonschema.validate(json.loads(arguments), CITY if called == "weather" else {"type": "object"})
        assert called == "weather" or name == "tools, required"


def test_models(server, client):
    assert [model.id for model in client.models.list().data] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == ["tiny"]

    asyncio.run(ask())


def test_what_is_beside_the_api(tiny, server, client):
    """Through the client's own connection, at the root of the server."""
    root = client.with_options(base_url=server.url)
    tokens = root.post("/tokenize", cast_to=object, body={"prompt": PROMPT})
    assert isinstance(tokens, dict)
    assert tokens["tokens"] == tiny.tokenizer.encode(PROMPT)
    back = root.post("/detokenize", cast_to=object, body={"tokens": tokens["tokens"][1:]})
    assert back == {"prompt": PROMPT}
    chat = root.post("/tokenize", cast_to=object, body={"messages": MESSAGES})
    assert isinstance(chat, dict)
    assert chat["tokens"] == tiny.llm.chat_tokens(MESSAGES)
    assert root.get("/health", cast_to=object) == {"status": "healthy"}
    assert root.get("/ready", cast_to=object) == {"status": "ready"}
    version = root.get("/version", cast_to=object)
    assert isinstance(version, dict)
    assert set(version) == {"version", "jax"}
    metrics = root.get("/metrics", cast_to=httpx.Response).text
    assert "sarathi_late_compiles 0.0" in metrics.splitlines()
    for path in ("/docs", "/openapi.json", "/"):
        assert httpx.get(server.url + path).status_code == 200


def test_errors(server, client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model="tiny", prompt="x", suffix="y")
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, top_logprobs=2)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
