"""`/v1/chat/completions`: a conversation in, its next message out."""

import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from sarathi_jax.request import Logprob, RequestError, StructuredOutputsParams
from sarathi_jax.server.calls import message_of
from sarathi_jax.server.completions import count_tokens, token_text
from sarathi_jax.server.errors import ApiError
from sarathi_jax.server.front import Front, refusal
from sarathi_jax.server.generation import Generation
from sarathi_jax.server.schemas import ChatBody, Message
from sarathi_jax.server.streams import DONE, event
from sarathi_jax.server.tools import ToolUse, instructions
from sarathi_jax.tokenizer import Tokenizer

PLAIN_TEMPLATE = """{{ bos_token }}{% for message in messages -%}
{{ message.role | capitalize }}: {{ message.content or '' }}
{%- for call in message.tool_calls or [] %}

<tool_call>
{{ call.function | tojson }}
</tool_call>
{%- endfor %}

{% endfor -%}
{% if add_generation_prompt %}Assistant:{% endif %}"""
"""For models without a chat template: a dialogue in plain words."""


class Chats:
    """Answers the calls of this endpoint.

    Args:
      front: to the engine.
    """

    def __init__(self, front: Front):
        self._front = front

    async def open(self, body: ChatBody, request_id: str) -> "ChatAnswer":
        """Accepts a call.

        Raises:
          ApiError: it cannot be served.
        """
        self._front.check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs", code="invalid_value")
        if None not in (body.max_tokens, body.max_completion_tokens):
            message = "max_tokens and max_completion_tokens mean the same: give one of them"
            raise ApiError(400, message, param="max_tokens", code="invalid_value")
        tools = ToolUse(body)
        try:
            constraint = _constraint(body, tools)
        except RequestError as error:
            raise refusal(error) from None
        more: dict[str, Any] = {} if constraint is None else {"structured_outputs": constraint}
        params = body.sampling(
            max_tokens=body.max_tokens or body.max_completion_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            **more,
        )
        self._front.check_room(params.n)
        described = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if tools.is_used else []
        prompt = await chat_tokens(self._front, body.messages, described)
        generation = await self._front.open(
            request_id,
            [prompt],
            params,
            streams=bool(body.stream),
            priority=body.priority or 0,
            slo_ms=body.slo_ms,
        )
        return ChatAnswer(body, f"chatcmpl-{request_id}", self._front.tokenizer(), generation, tools)


class ChatAnswer:
    """The answer to one call.

    Args:
      body: of the call.
      answer_id: of the answer.
      tokenizer: of the model.
      generation: what makes it.
      tools: how the call uses them.
    """

    def __init__(self, body: ChatBody, answer_id: str, tokenizer: Tokenizer, generation: Generation, tools: ToolUse):
        self.generation = generation
        self._body = body
        self._tokenizer = tokenizer
        self._tools = tools
        self._head = {"id": answer_id, "created": int(time.time()), "model": body.model}

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        try:
            await self.generation.finish()
        finally:
            self.generation.close()
        choices = []
        for record in self.generation.samples(0):
            output, reader = record.output(), self._tools.reader()
            message = message_of(reader.push(output.text) + reader.finish())
            choice = {
                "index": record.index,
                "message": message,
                "logprobs": self._logprobs(output.token_ids, output.logprobs),
                "finish_reason": _reason(output.finish_reason, reader.calls_are_complete),
                "stop_reason": output.stop_reason,
            }
            if self._body.return_token_ids:
                prompt = self.generation.requests[0].prompt_token_ids
                choice |= {"token_ids": list(output.token_ids), "prompt_token_ids": list(prompt)}
            choices.append(choice)
        usage = count_tokens(self.generation)
        return {"object": "chat.completion", **self._head, "choices": choices, "usage": usage}

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events."""
        head = {"object": "chat.completion.chunk", **self._head}
        readers = [self._tools.reader() for _ in self.generation.samples(0)]
        begun: set[int] = set()
        usage = {"usage": None} if self._body.wants_usage else {}
        try:
            async for deltas in self.generation.deltas():
                for delta in deltas:
                    reader = readers[delta.sample]
                    pieces = reader.push(delta.text)
                    if delta.finish_reason is not None:
                        pieces += reader.finish()
                    if delta.sample not in begun:
                        begun.add(delta.sample)
                        pieces.insert(0, {"role": "assistant", "content": ""})
                    ends = delta.finish_reason is not None
                    if ends or ((delta.logprobs or self._body.return_token_ids) and not pieces):
                        pieces.append({})
                    for i, piece in enumerate(pieces):
                        is_last = i == len(pieces) - 1
                        choice: dict[str, Any] = {"index": delta.sample, "delta": piece, "logprobs": None}
                        choice["finish_reason"] = None
                        if is_last:
                            choice["logprobs"] = self._logprobs(delta.token_ids, delta.logprobs)
                            if ends:
                                choice["finish_reason"] = _reason(delta.finish_reason, reader.calls_are_complete)
                                choice["stop_reason"] = delta.stop_reason
                            if self._body.return_token_ids:
                                choice["token_ids"] = list(delta.token_ids)
                        yield event(head | {"choices": [choice]} | usage)
            if self._body.wants_usage:
                yield event(head | {"choices": [], "usage": count_tokens(self.generation)})
            yield DONE
        finally:
            self.generation.close()

    def _logprobs(self, ids: Sequence[int], tables: Sequence[dict[int, Logprob]] | None) -> dict[str, Any] | None:
        """In the format of this endpoint: an object for each token."""
        if tables is None:
            return None
        num_top, content = self._body.top_logprobs or 0, []
        for token, table in zip(ids, tables, strict=True):
            top = [self._entry(i, entry) for i, entry in list(table.items())[:num_top]]
            content.append(self._entry(token, table[token]) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, entry: Logprob) -> dict[str, Any]:
        text, data = token_text(self._tokenizer, token), self._tokenizer.token_bytes(token)
        return {"token": text, "logprob": entry.logprob, "bytes": list(data)}


async def chat_tokens(front: Front, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
    """A conversation as the prompt of its next message.

    Args:
      front: with the tokenizer.
      messages: at least one.
      tools: what the model may call, as OpenAI describes it.

    Raises:
      ApiError: the template refuses it, or it is too long.
    """
    tokenizer = front.tokenizer()
    plain = [_plain(message) for message in messages]
    if tools and not tokenizer.chat_knows_tools:
        plain.insert(0, {"role": "system", "content": instructions(tools)})
    text = await front.run(lambda: tokenizer.apply_chat_template(plain, tools=tools or None))
    return await front.encode(text, False, "messages")


def _plain(message: Message) -> dict[str, Any]:
    """A message as chat templates know it."""
    content = message.content
    fields: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content if isinstance(content, str) else "\n".join(part.text for part in content or ()),
    }
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            fields[name] = getattr(message, name)
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    if content is None and not message.tool_calls and message.role != "assistant":
        raise ApiError(400, f"a message of role {message.role} needs content", param="messages", code="invalid_value")
    return fields


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        message = "arguments of a tool call must be a JSON object as text"
        raise ApiError(400, message, param="messages", code="invalid_value") from None


def _constraint(body: ChatBody, tools: ToolUse) -> StructuredOutputsParams | None:
    """What the answer must look like.

    Raises:
      ApiError: two things at once.
      RequestError: no schema.
    """
    wanted = body.response_format
    shape = None
    if wanted is not None and wanted.type != "text":
        if wanted.type == "json_schema" and wanted.json_schema is None:
            message = "response_format of type json_schema needs json_schema"
            raise ApiError(400, message, param="response_format", code="invalid_value")
        shape = StructuredOutputsParams(json_object=True)
        if wanted.type == "json_schema":
            assert wanted.json_schema is not None
            shape = StructuredOutputsParams(json=wanted.json_schema.schema_)
    called = tools.constraint()
    given = {"response_format": shape, "tools": called, "structured_outputs": body.structured_outputs}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ApiError(400, f"{' and '.join(names)} cannot go together", param=names[0], code="invalid_value")
    return shape or called


def _reason(reason: str | None, calls_are_complete: bool) -> str | None:
    return "tool_calls" if calls_are_complete and reason == "stop" else reason
