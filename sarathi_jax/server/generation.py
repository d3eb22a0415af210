"""The answer to a call while it is made: tokens become text, stop strings are found, what is new is told apart."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sarathi_jax.output import SampleRecord
from sarathi_jax.request import FinishReason, Logprob, Request, RequestOutput
from sarathi_jax.server.errors import ApiError, unavailable
from sarathi_jax.server.loop import EngineFailedError, EngineLoop, Inbox
from sarathi_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Delta:
    """What is new of one sample.

    Attributes:
      prompt: index of the prompt in the call.
      sample: which of the prompt's `n`.
      logprobs: of the new tokens; None if not asked.
    """

    prompt: int
    sample: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class Generation:
    """The answer to the prompts of one call, while it is made.

    Args:
      loop: where the prompts are.
      inbox: where their outputs come in.
      requests: as accepted, with the parameters of the caller.
      tokenizer: None: no text.
      timeout_s: longest time to the end.
    """

    def __init__(
        self,
        loop: EngineLoop,
        inbox: Inbox,
        requests: Sequence[Request],
        tokenizer: Tokenizer | None,
        timeout_s: float,
    ):
        self.requests = requests
        self._loop = loop
        self._inbox = inbox
        self._index = {request.request_id: i for i, request in enumerate(requests)}
        self._records = [[SampleRecord(i, r, tokenizer) for i in range(r.params.n)] for r in requests]
        self._num_sent = [[0] * r.params.n for r in requests]
        self._prompt_logprobs: list[Any] = [None] * len(requests)
        self._num_cached = [0] * len(requests)
        self._timeout_s = timeout_s
        self._ends_at = asyncio.get_running_loop().time() + timeout_s

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(record.token_ids) for records in self._records for record in records)

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompts, those that the cache held already."""
        return sum(self._num_cached)

    def samples(self, prompt: int) -> Sequence[SampleRecord]:
        """The samples of a prompt so far."""
        return self._records[prompt]

    def prompt_logprobs(self, prompt: int) -> tuple[dict[int, Logprob] | None, ...] | None:
        """Those of a prompt's tokens, once its first output is there; None if not asked."""
        return self._prompt_logprobs[prompt]

    def close(self) -> None:
        """Aborts what is left."""
        self._loop.abort(list(self._index))

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What is new, until all samples have ended.

        Raises:
          ApiError: the engine has failed, the call takes too long, or a grammar could not be followed.
        """
        while any(record.finish_reason is None for records in self._records for record in records):
            try:
                async with asyncio.timeout_at(self._ends_at):
                    outputs = await self._inbox.take()
            except TimeoutError:
                raise ApiError(
                    408, f"the answer was not complete within {self._timeout_s:g} s", code="request_timeout"
                ) from None
            except EngineFailedError as error:
                raise unavailable(str(error), "engine_failed") from None
            deltas = [delta for output in outputs for delta in self._news(output)]
            if deltas:
                yield deltas

    async def finish(self) -> None:
        """Waits for the whole answer; raises as `deltas`."""
        async for _ in self.deltas():
            pass

    def _news(self, output: RequestOutput) -> list[Delta]:
        prompt, news = self._index[output.request_id], []
        self._prompt_logprobs[prompt] = output.prompt_logprobs
        self._num_cached[prompt] = output.metrics.num_cached_tokens
        for record, sample in zip(self._records[prompt], output.outputs, strict=True):
            if record.finish_reason is not None:
                continue
            num_known = len(record.token_ids)
            for i in range(num_known, len(sample.token_ids)):
                if sample.logprobs is not None:
                    record.logprobs.append(sample.logprobs[i])
                if record.add(sample.token_ids[i], 0.0) is not None:
                    break
            if record.finish_reason is None and sample.finish_reason is not None:
                record.end(sample.finish_reason, sample.stop_reason)
            elif record.finish_reason is not None and sample.finish_reason is None:
                assert record.text.stopped_by is not None
                self._loop.end_sample(output.request_id, record.index, record.text.stopped_by)
            if record.finish_reason == "abort":
                raise ApiError(400, str(record.stop_reason), param="structured_outputs", code="grammar_failed")
            text, sent = record.output().text, self._num_sent[prompt][record.index]
            self._num_sent[prompt][record.index] = len(text)
            if len(record.token_ids) > num_known or record.finish_reason is not None:
                logprobs = None if sample.logprobs is None else tuple(record.logprobs[num_known:])
                ids = tuple(record.token_ids[num_known:])
                end = record.finish_reason, record.stop_reason
                news.append(Delta(prompt, record.index, text[sent:], ids, logprobs, *end))
        return news
