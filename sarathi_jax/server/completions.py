"""`/v1/completions`: prompts in, the text behind them out."""

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from sarathi_jax.request import Logprob
from sarathi_jax.server.errors import ApiError
from sarathi_jax.server.front import Front
from sarathi_jax.server.generation import Delta, Generation
from sarathi_jax.server.schemas import CompletionBody
from sarathi_jax.server.streams import DONE, event
from sarathi_jax.tokenizer import Tokenizer

Table = dict[int, Logprob] | None


class Completions:
    """Answers the calls of this endpoint.

    Args:
      front: to the engine.
    """

    def __init__(self, front: Front):
        self._front = front

    async def open(self, body: CompletionBody, request_id: str) -> "CompletionAnswer":
        """Accepts a call.

        Raises:
          ApiError: it cannot be served.
        """
        self._front.check_model(body.model)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise ApiError(400, "best_of must equal n: nothing is left out", param="best_of", code="invalid_value")
        # No token at all is asked with echo, to score the prompt: one is drawn and not shown.
        scores = body.max_tokens == 0
        if scores and not body.echo:
            raise ApiError(400, "max_tokens=0 needs echo", param="max_tokens", code="invalid_value")
        params = body.sampling(
            max_tokens=1 if scores else 16 if body.max_tokens is None else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        given = _prompts(body.prompt)
        self._front.check_room(len(given) * params.n)
        prompts = await asyncio.gather(*[self._tokens(prompt) for prompt in given])
        generation = await self._front.open(
            request_id,
            prompts,
            params,
            streams=bool(body.stream),
            priority=body.priority or 0,
            slo_ms=body.slo_ms,
        )
        texts = [prompt if isinstance(prompt, str) else None for prompt in given]
        return CompletionAnswer(body, f"cmpl-{request_id}", self._front.served.tokenizer, generation, texts, scores)

    async def _tokens(self, prompt: str | list[int]) -> list[int]:
        return await self._front.encode(prompt) if isinstance(prompt, str) else prompt


class CompletionAnswer:
    """The answer to one call.

    Args:
      body: of the call.
      answer_id: of the answer.
      tokenizer: of the model.
      generation: what makes it.
      texts: the prompts, None where tokens were given.
      scores: nothing but the prompt is wanted.
    """

    def __init__(
        self,
        body: CompletionBody,
        answer_id: str,
        tokenizer: Tokenizer | None,
        generation: Generation,
        texts: Sequence[str | None],
        scores: bool,
    ):
        self.generation = generation
        self._body = body
        self._tokenizer = tokenizer
        self._texts = texts
        self._scores = scores
        self._head = {"id": answer_id, "object": "text_completion", "created": int(time.time()), "model": body.model}
        self._offsets: dict[tuple[int, int], int] = {}

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        try:
            await self.generation.finish()
        finally:
            self.generation.close()
        choices = []
        for prompt, request in enumerate(self.generation.requests):
            for record in self.generation.samples(prompt):
                output = record.output()
                end = output.finish_reason, output.stop_reason
                delta = Delta(prompt, record.index, output.text, output.token_ids, output.logprobs, *end)
                choices.append(self._choice(delta, is_first=True) | self._ids(delta, request.prompt_token_ids))
        return self._head | {"choices": choices, "usage": self.usage()}

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events."""
        begun: set[tuple[int, int]] = set()
        usage = {"usage": None} if self._body.wants_usage else {}
        try:
            async for deltas in self.generation.deltas():
                for delta in deltas:
                    key = delta.prompt, delta.sample
                    is_first = key not in begun
                    begun.add(key)
                    if not (is_first or delta.text or delta.finish_reason or delta.logprobs or self._shows_ids):
                        continue  # nothing of it can be shown yet
                    prompt = self.generation.requests[delta.prompt].prompt_token_ids
                    choice = self._choice(delta, is_first) | self._ids(delta, prompt if is_first else None)
                    yield event(self._head | {"choices": [choice]} | usage)
            if self._body.wants_usage:
                yield event(self._head | {"choices": [], "usage": self.usage()})
            yield DONE
        finally:
            self.generation.close()

    def usage(self) -> dict[str, Any]:
        return count_tokens(self.generation, self._scores)

    @property
    def _shows_ids(self) -> bool:
        return bool(self._body.return_token_ids)

    def _ids(self, delta: Delta, prompt: Sequence[int] | None) -> dict[str, Any]:
        if not self._shows_ids:
            return {}
        ids = {"token_ids": [] if self._scores else list(delta.token_ids)}
        return ids if prompt is None else ids | {"prompt_token_ids": list(prompt)}

    def _choice(self, delta: Delta, is_first: bool) -> dict[str, Any]:
        request = self.generation.requests[delta.prompt]
        text, ids, tables = delta.text, delta.token_ids, delta.logprobs
        if self._scores:
            text, ids, tables = "", (), None if tables is None else ()
        if self._body.echo and is_first:
            prompt = request.prompt_token_ids
            given = self._texts[delta.prompt]
            if given is None:
                given = "" if self._tokenizer is None else self._tokenizer.decode(prompt)
            text, ids = given + text, prompt + ids
            if tables is not None:
                tables = (*(self.generation.prompt_logprobs(delta.prompt) or ()), *tables)
        return {
            "index": delta.prompt * request.params.n + delta.sample,
            "text": text,
            "logprobs": None if tables is None else self._logprobs((delta.prompt, delta.sample), ids, tables),
            # Where only the prompt is asked, the length asked for is reached.
            "finish_reason": "length" if self._scores else delta.finish_reason,
            "stop_reason": None if self._scores else delta.stop_reason,
        }

    def _logprobs(self, key: tuple[int, int], ids: Sequence[int], tables: Sequence[Table]) -> dict[str, Any]:
        """In the format of this endpoint: parallel lists over the tokens."""
        text_of = functools.cache(lambda token: token_text(self._tokenizer, token))
        texts = [text_of(token) for token in ids]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(key, 0))
            self._offsets[key] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [table and table[token].logprob for token, table in zip(ids, tables, strict=True)],
            "top_logprobs": [table and {text_of(i): entry.logprob for i, entry in table.items()} for table in tables],
            "text_offset": offsets,
        }


def count_tokens(generation: Generation, scores: bool = False) -> dict[str, Any]:
    """The `usage` of an answer.

    Args:
      generation: that made it.
      scores: the drawn tokens are not shown, so they do not count.
    """
    num_prompt, num_output = generation.num_prompt_tokens, 0 if scores else generation.num_output_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }


def token_text(tokenizer: Tokenizer | None, token: int) -> str:
    """The text of one token; a token id where there is no tokenizer."""
    return f"token_id:{token}" if tokenizer is None else tokenizer.decode([token], skip_special_tokens=False)


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[Any]:
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise ApiError(400, "prompt is empty: give at least one token", param="prompt", code="invalid_value")
    return list(given)
